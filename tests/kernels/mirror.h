/* mirror.h: the CUDA backend behind pointers of the host, so that every case of this folder runs on it unchanged.
 *
 * An op of mirror_ops() copies each array of its session that it is handed to a device allocation of its own, guards
 * and gaps included, calls the CUDA op, and copies what came of it back. Activations are float on the host and have the
 * session's `act` on the device; a sentinel there becomes a sentinel here, so "not written" survives the conversion.
 * An input that the device changed fails the test. */
#ifndef TESTS_KERNELS_MIRROR_H
#define TESTS_KERNELS_MIRROR_H

#include "tests/kernels/harness.h"

/* Whether ADDERD_TEST_CUDA=1 asks for the CUDA backend in place of the CPU's. Ends the program with 77 (skipped) and
 * says why when it cannot be had. */
bool mirror_wanted(void);
/* NULL in a build without CUDA. device_open gives the process's one device, device_close keeps it. */
const struct kernel_ops *mirror_ops(void);
/* The session whose arrays the next ops are handed. */
void mirror_enter(struct session *session);

#endif
