/* auth.h: API keys. A token is "adder-" and 32 random bytes in URL-safe base64; the store keeps its hash
 * alone. */
#ifndef DAEMON_AUTH_H
#define DAEMON_AUTH_H

#include "api/problem.h"
#include "daemon/store.h"

struct auth;
/* With no live key everything is allowed, and the server binds to loopback only (checked by the caller). */
int auth_create(const struct key_row *keys, size_t count, struct auth **ret_auth, struct error *error);
void auth_free(struct auth *auth);
/* The keys as they are now (store_key_list). On failure the old ones stay in force. Once a key was required
 * one stays required until the daemon starts again, even if the last key is revoked: a server that listens
 * to the world must not open up. */
int auth_reload(struct auth *auth, const struct key_row *keys, size_t count, struct error *error);
bool auth_required(const struct auth *auth);
/* header: the Authorization header or NULL. Returns 0 and the key's id (for scopes and logs; "" when none is
 * required), or -1 with 401. Compares in constant time. */
int auth_check(const struct auth *auth, const char *header, char ret_key_id[ID_BYTES],
               struct problem *problem);
/* Is this use worth a store_key_used? At most once a minute for a key. */
bool auth_note_use(struct auth *auth, const char *key_id, int64_t now);

/* `adderd keys create NAME | list | revoke ID`, on the data directory of --data-dir; beside a running daemon
 * too, which takes notice within seconds. argv after "keys". Returns an exit status. */
int auth_keys_command(int argc, char **argv);

#endif
