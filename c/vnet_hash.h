/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Hashing and steering by tun itself, without any program: the series "tun: Introduce virtio-net
 * hashing feature", which no released kernel has, in each of its ABIs.
 *
 * Every function that can fail returns 0 or a negative errno.  Nothing is checked here but what
 * would be read or written out of bounds: the kernel's own checks are few, and what it makes of
 * nonsense is for tests to see.
 */
#ifndef QS_VNET_HASH_H
#define QS_VNET_HASH_H

#include <stddef.h>
#include <stdint.h>

#include "bpf/abi.h"

/* The ABIs differ in their request words, so that asking tells them apart. */
enum qs_vnet_abi {
	QS_VNET_ABI_3 = 3,   /* v3 to v11: TUNGETVNETHASHCAP, TUNSETVNETHASH */
	QS_VNET_ABI_12 = 12, /* v12: TUNGETVNETHASHTYPES, TUNSETVNETREPORTINGAUTOMQ and so on */
};

/* What a kernel says that it can do.  -EINVAL or -EBADFD where it knows nothing of it. */
struct qs_vnet_can {
	__u32 abi;
	__u32 types; /* QS_HASH_* */
	__u8 rss;
	__u8 report;
};
/* fd is any of /dev/net/tun, with a device or without one. */
int qs_vnet_can(int fd, struct qs_vnet_can *can);

/*
 * Steer the fd's device by RSS from now on, and with report write the hash into the packets' header
 * where that has room.  table has indirections_len entries, the key QS_KEY_BYTES.
 */
int qs_vnet_rss(int fd, __u32 abi, const struct qs_rss_config *config, const __u8 *key,
		const __u16 *table, int report);
/* Let automq choose from now on, and report the kernel's own hash of these types; 0 reports none. */
int qs_vnet_automq(int fd, __u32 abi, __u32 types);

/*
 * What this kernel's tun does, seen on a tap of a process of its own in a network namespace of its
 * own, both of which are gone afterwards: setters are tried, and known packets sent.
 */
struct qs_vnet_probe {
	struct qs_vnet_can can;
	__u8 steers;	/* known packets came out of the right queues */
	__u8 reports;	/* ... with the right hash in their headers */
	__u8 exclusive; /* RSS and a steering program refuse each other (EBUSY) */
	__u8 strict;	/* a header without room for the hash, or big-endian, is refused (EBUSY) */
};

/* The process that looked, with RSS by these set on its tap for as long as it is there. */
struct qs_vnet_probing {
	int pid;
	int answer;
	int hold;
};
#define QS_VNET_PROBE_ENTRIES 2
extern const __u8 qs_vnet_probe_key[QS_KEY_BYTES];
extern const __u16 qs_vnet_probe_table[QS_VNET_PROBE_ENTRIES];

/*
 * -EOPNOTSUPP where the kernel has none of it, -EPERM where a right is missing (CAP_SYS_ADMIN,
 * CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF), -ETIMEDOUT where it does not end in time.  Only after 0 is
 * there something to end.
 */
int qs_vnet_probe_start(struct qs_vnet_probing *probing, struct qs_vnet_probe *found);
void qs_vnet_probe_end(struct qs_vnet_probing *probing);

#endif
