/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A tap's own program where the host has a shared body: a few instructions that hand it the addresses
 * of the tap's own configuration.
 *
 * Theory of operation
 *
 * What a tap costs decides what a host of 1000 taps costs.  So the packet path is in a body that is
 * verified once per host, and a tap has a stub.  The stub is put together here and not compiled: an
 * object file would have to be read, and its kernel types resolved, for each tap or each process.
 * 20 instructions and a map take a tenth of a millisecond to load; 60 and four maps, three of which
 * QEMU maps into its memory, take two.
 *
 * The stub owns the tap's maps, so that they live exactly as long as the tap's program; there is no
 * table of taps, no slot to give back, and nothing is looked up by interface index.
 *
 * A configuration that qsteer was given never changes: another one is another program, which takes
 * the first one's place at once.  So it is frozen, in one map in ordinary kernel memory, a cache line
 * or two of it in use.  QEMU's maps are three pages (it maps them into its memory), are read with
 * every packet, and may change at any moment.
 *
 * A stub whose body is gone (its pin was removed; `qsteer status` calls it broken) still spreads
 * flows, by the hash that the kernel may have at hand.
 */
#ifndef QS_STUB_H
#define QS_STUB_H

#include "shim.h"

/*
 * Load a stub over a configuration, frozen.  -EOPNOTSUPP where it has no place for a queue of the
 * table, all of which have to be below 256.
 */
int qs_stub_load_frozen(const struct qs_ident *ident, const struct qs_rss_config *config,
			const __u8 key[QS_KEY_BYTES], const __u16 *table, int bodies_fd,
			struct qs_program *program);
/*
 * Load a stub over three maps, for QEMU to write: those of another program in map_fds
 * (configuration, key, table), or NULL for new ones.  -EOPNOTSUPP where they are not laid out alike.
 */
int qs_stub_load_maps(const struct qs_ident *ident, const int *map_fds, int bodies_fd,
		      struct qs_program *program);

/* The maps that QEMU writes, in its order. */
enum {
	QS_CONFIG,
	QS_KEY,
	QS_TABLE,
	QS_RSS_MAPS
};

/* -EOPNOTSUPP where a map is not laid out as this one of them. */
int qs_rss_map_check(int which, int fd);

#endif
