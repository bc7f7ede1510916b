/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * What BPF programs, the C shim and Python share: no layout is written down twice.
 *
 * QS_ABI numbers the contract between a tap's stub and the shared body, and the behaviour of the
 * body.  A host keeps one pinned body per number, so that a running VM is served by the body that it
 * was loaded with.  Any change to what the stub hands over or to what the body answers takes a new
 * number.
 */
#ifndef QS_ABI_H
#define QS_ABI_H

#include <linux/types.h>

#define QS_MAGIC 0x0072656574737173ULL /* "qsteer" */
#define QS_ABI 2

/* VIRTIO_NET_RSS_HASH_TYPE_*: virtio 1.2, 5.1.6.4.3.1 */
#define QS_HASH_IP4 0x001
#define QS_HASH_TCP4 0x002
#define QS_HASH_UDP4 0x004
#define QS_HASH_IP6 0x008
#define QS_HASH_TCP6 0x010
#define QS_HASH_UDP6 0x020
#define QS_HASH_IP_EX 0x040
#define QS_HASH_TCP_EX 0x080
#define QS_HASH_UDP_EX 0x100
#define QS_HASH_ALL 0x1ff

#define QS_KEY_BYTES 40
#define QS_TABLE_ENTRIES 128
#define QS_WINDOWS 5

/*
 * The three maps that QEMU writes when it is handed them (ebpf-rss-fds); sizes, names and order
 * are QEMU's.
 */
#define QS_MAP_CONFIG "tap_rss_map_configurations"
#define QS_MAP_KEY "tap_rss_map_toeplitz_key"
#define QS_MAP_TABLE "tap_rss_map_indirection_table"

struct qs_rss_config {
	__u8 redirect; /* 0: everything goes to default_queue */
	__u8 populate_hash;
	__u32 hash_types;
	__u16 indirections_len;
	__u16 default_queue;
} __attribute__((packed));

struct qs_rss_key {
	__u32 leftmost_32_bits; /* host order */
	__u8 rest[QS_KEY_BYTES - 4];
};

_Static_assert(sizeof(struct qs_rss_config) == 10, "QEMU maps 10 bytes");
_Static_assert(sizeof(struct qs_rss_key) == QS_KEY_BYTES, "QEMU maps 40 bytes");

/* How a program was made (qs_ident.build). */
enum qs_build {
	QS_BUILD_SHARED_BODY = 1, /* stub of the tap's own, body shared by all taps of the host */
	QS_BUILD_COMPLETE = 2,	  /* everything in the tap's own program; CAP_BPF is enough */
};

/* Where the RSS configuration in the maps comes from (qs_ident.source). */
enum qs_source {
	QS_SOURCE_STATIC = 1,	    /* given by the operator */
	QS_SOURCE_SHARED_MAPS = 2,  /* written by QEMU */
	QS_SOURCE_DEVICE_STATE = 3, /* read out of QEMU's device state */
	QS_SOURCE_GUEST_AGENT = 4,  /* read by an agent in the guest */
	QS_SOURCE_QEMU_MAPS = 5,    /* written by QEMU, into the maps of its own program */
};

/*
 * The frozen rodata of each of qsteer's programs: how `status` knows its own.  A name can be
 * forged and a tag changes with every release.
 */
struct qs_ident {
	__u64 magic;
	__u32 abi;
	__u32 build;
	__u32 source;
	__u32 displaced; /* id of the QEMU program that this one took off, 0 for none */
	__u8 version[4]; /* major, minor, micro of the qsteer that loaded it */
	char tap[16];	 /* the tap that it was made for */
	__u32 reserved;
};

_Static_assert(sizeof(struct qs_ident) == 48, "no hidden padding");

/*
 * What a packet is steered by, made ready when a configuration is known in advance: a cache line,
 * and two more where the table needs more than 24 entries.
 */
struct qs_steering {
	__u64 windows[QS_WINDOWS]; /* of the key: toeplitz.h */
	__u8 table[QS_TABLE_ENTRIES];
};

/*
 * The frozen rodata of a stub whose configuration never changes: who it is, what the body works with,
 * and the configuration as it was given.  Another layout takes another number.
 */
#define QS_FROZEN_LAYOUT 0x0000016e657a6f72ULL
struct qs_frozen {
	struct qs_ident ident;
	__u64 layout;
	__u64 reserved[2]; /* steering begins a cache line where struct bpf_array has 312 bytes */
	struct qs_steering steering;
	struct qs_rss_config config;
	__u8 key[QS_KEY_BYTES];
	__u16 table[QS_TABLE_ENTRIES];
};

/* One open queue of a tun/tap device, as the task_file iterator reports it. */
struct qs_queue {
	__u64 file;	  /* tells two fds of one open file from two queues */
	__u64 attachment; /* where the kernel keeps it: another one when replaced; 0 for none */
	__u64 vnet_hash; /* changes with what tun hashes by itself (struct qs_vnet_hash); 0: nothing */
	__u32 pid;
	__u32 fd;
	__u32 netns; /* inode number of the network namespace */
	__u32 ifindex;
	__u32 flags;   /* IFF_* of the tun device */
	__u32 prog_id; /* 0: no steering program */
	__u32 active;  /* queues that packets are spread over */
	__u32 disabled;
	__u16 queue_index;
	__u16 detached;
	__u32 header; /* bytes of the virtio-net header, where IFF_VNET_HDR is set */
	char comm[16];
	char tap[16];
};

_Static_assert(sizeof(struct qs_queue) == 96, "no hidden padding");

/*
 * What the tun device of one open queue hashes by itself, without a program, where a kernel can do
 * that.  A table of more than QS_TABLE_ENTRIES entries is cut short.
 */
struct qs_vnet_hash {
	__u32 netns;
	__u32 ifindex;
	__u8 rss; /* 0: automq chooses */
	__u8 report;
	__u16 unclassified_queue;
	__u32 types;
	__u32 entries;		/* of the table */
	__u8 key[QS_KEY_BYTES]; /* as it lies in memory: mostly in words of the machine's order */
	__u16 table[QS_TABLE_ENTRIES];
};

_Static_assert(sizeof(struct qs_vnet_hash) == 316, "no hidden padding");

/* What the programs that look at tun devices keep between two runs. */
struct qs_tun_state {
	__u64 tun_fops; /* the address of tun's file operations, 0 until it is learnt */
	__u64 digest;
};

#endif
