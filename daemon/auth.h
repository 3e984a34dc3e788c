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
bool auth_required(const struct auth *auth);
/* header: the Authorization header or NULL. Returns 0 and the key's id (for scopes and logs; "" when none is
 * required), or -1 with 401. Compares in constant time. */
int auth_check(const struct auth *auth, const char *header, char ret_key_id[ID_BYTES],
               struct problem *problem);
/* `adderd keys create NAME | list | revoke ID`, on the data directory of --data-dir. Returns an exit status.
 */
int auth_keys_command(int argc, char **argv);

#endif
