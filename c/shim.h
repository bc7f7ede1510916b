/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The thin layer between Python and the kernel: tun ioctls, fds over SCM_RIGHTS, pidfd_getfd,
 * capabilities, and the libbpf calls that qsteer needs.
 *
 * Every function that can fail returns 0 or a negative errno; what it gives comes last, through
 * pointers, and is untouched on failure.  Every fd that is given is close-on-exec and the caller's.
 */
#ifndef QS_SHIM_H
#define QS_SHIM_H

#include <stddef.h>
#include <stdint.h>

#include "bpf/abi.h"

/* tun/tap: drivers/net/tun.c, Documentation/networking/tuntap.rst */

/*
 * Open one queue of a multi-queue tap with a virtio-net header.  With exclusive, a device of that
 * name that exists already is EBUSY; an empty name lets the kernel choose.  name takes the result.
 */
int qs_tap_open(char name[16], int exclusive, int *fd);
/* The device that a queue fd belongs to; -EBADFD when it belongs to none. */
int qs_tap_name(int fd, char name[16]);
/* IFF_TAP, IFF_MULTI_QUEUE and so on of the device that a queue fd belongs to. */
int qs_tap_flags(int fd, __u32 *flags);
/* Attach a steering program to the fd's device. */
int qs_steering_attach(int fd, int prog_fd);
/* Take any steering program off the fd's device. */
int qs_steering_detach(int fd);

/* What the kernel keeps besides IFF_* in a device's flags (drivers/net/tun_vnet.h). */
#define QS_TUN_VNET_LE 0x80000000U
#define QS_TUN_VNET_BE 0x40000000U

/* Processes and privileges */

/* Inode number of the host's pid namespace (include/linux/proc_ns.h: PROC_PID_INIT_INO). */
#define QS_HOST_PID_NAMESPACE 0xEFFFFFFCU

int qs_pidfd_getfd(int pidfd, int target, int *fd);
/* Move the calling thread into a network namespace. */
int qs_netns_enter(int netns_fd);
/* Send count fds and one byte over a unix socket; count is at most 16. */
int qs_fds_send(int sock, const int *fds, size_t count);
/* Receive exactly count fds; -EBADMSG, and none kept, if the message carries another number. */
int qs_fds_receive(int sock, int *fds, size_t count);
/* Empty the ambient, inheritable, permitted and effective capability sets of this process. */
int qs_capabilities_drop(void);
/*
 * Keep no capability of this process but those of a mask, bit n for CAP number n, and let none come
 * back through a program that is executed.
 */
int qs_capabilities_limit(uint64_t keep);
/* The effective capability set, bit n for CAP number n. */
int qs_capabilities_effective(uint64_t *set);
/* The process that holds a write lock of fcntl(2) on any of a file, 0 for none; fd is open for reading. */
int qs_lock_writer(int fd, int *pid);
/* Mount a BPF file system on path unless there is one. */
int qs_bpffs_mount(const char *path);

/* Programs */

/* The three maps that QEMU writes are -1 where the configuration is frozen. */
struct qs_program {
	int prog_fd;
	int config_fd;
	int key_fd;
	int table_fd;
	__u32 id;
};

/*
 * Load a tap's program with everything in it from an object file, its identity in frozen rodata.
 * map_fds are the configuration, key and table maps of another program, which both have then, or
 * NULL for three new ones.  -EOPNOTSUPP where a map is not laid out as this program's.
 */
int qs_program_load(const char *object, const struct qs_ident *ident, const int *map_fds,
		    struct qs_program *program);
/* Load the shared body into a new prog_array. */
int qs_bodies_create(const char *object, int *bodies_fd);
/* Fill the prog_array of a body that is gone. */
int qs_bodies_refill(int bodies_fd, const char *object);
/* Pin, and get what is pinned. */
int qs_pin(int fd, const char *path);
int qs_pinned(const char *path, int *fd);
/* The id of the shared body in a prog_array, 0 if it is gone. */
int qs_bodies_program(int bodies_fd, __u32 *id);

/* What libbpf and the verifier said since the last call, newest last; for this process. */
const char *qs_log_take(void);
/* Say something there. */
void qs_log_say(const char *text);

struct qs_program_info {
	__u32 id;
	__u32 type;
	__u32 config_id; /* ids of the maps with QEMU's names and sizes, or 0 */
	__u32 key_id;
	__u32 table_id;
	__u32 frozen_id; /* id of the map that a configuration is frozen in, or 0 */
	__u32 bodies_id; /* id of the prog_array that a stub calls into, or 0 */
	__u64 loaded_ns; /* after boot */
	__u32 uid;
	__u32 has_ident;
	__u32 verified_insns; /* what the verifier went through; 0 where the kernel does not tell */
	__u8 tag[8];
	char name[16];
	struct qs_ident ident;
};

int qs_program_fd(__u32 id, int *fd);
int qs_program_info(int prog_fd, struct qs_program_info *info);
int qs_map_fd(__u32 id, int *fd);
/* The next loaded program of the host after an id; -ENOENT after the last. */
int qs_program_next_id(__u32 after, __u32 *id);
/* The ids of all maps that a program uses; ids has room for QS_PROGRAM_MAPS, the kernel's limit. */
#define QS_PROGRAM_MAPS 64
int qs_program_maps(int prog_fd, __u32 *ids, __u32 *count);
/* What a map is; -EBADMSG where fd is not one of a map. */
int qs_map_info(int fd, __u32 *id, __u32 *type, char name[16]);

/* The configuration in a program's maps; table has QS_TABLE_ENTRIES entries. */
int qs_config_read(int config_fd, int key_fd, int table_fd, struct qs_rss_config *config,
		   __u8 key[QS_KEY_BYTES], __u16 *table);
/* The configuration in a frozen map; -EBADMSG where it is not one. */
int qs_frozen_read(int fd, struct qs_rss_config *config, __u8 key[QS_KEY_BYTES], __u16 *table);
/* Key, then table, then config: nothing is steered by halves before a program is attached. */
int qs_config_write(int config_fd, int key_fd, int table_fd, const struct qs_rss_config *config,
		    const __u8 key[QS_KEY_BYTES], const __u16 *table);

/*
 * Run a program on a packet that starts at the Ethernet header.  repeat times; answer is its
 * return value, cb_left 1 if it left anything in skb->cb, and duration_ns the kernel's average.
 */
int qs_program_run(int prog_fd, const void *packet, __u32 len, __u32 repeat, __u32 *answer,
		   __u32 *cb_left, __u32 *duration_ns);

/*
 * What looks at tun devices, of all processes and network namespaces of the host: the object file
 * is tun_queues or tun_vnet, for records, or tun_digest, for the digests.  tun_fd is any fd of
 * /dev/net/tun, and only needed to open.  An object whose tun module was unloaded since sees nothing any more.
 */
struct qs_tun_iter;
int qs_tun_iter_open(const char *object, int tun_fd, struct qs_tun_iter **iter);
void qs_tun_iter_close(struct qs_tun_iter *iter);
/*
 * Records about the open queues of all processes or (pid not 0) one, struct qs_queue or struct
 * qs_vnet_hash, to be freed with qs_free(); size is that of all of them, in bytes.
 */
int qs_tun_iter_read(struct qs_tun_iter *iter, int pid, void **records, size_t *size);
void qs_free(void *memory);
/* A number that changes with the taps, their queues, and what is attached to them. */
int qs_tun_digest_devices(struct qs_tun_iter *iter, uint64_t *digest);
/* A number that changes with the processes that hold queues; looks at every open file of the host. */
int qs_tun_digest_holders(struct qs_tun_iter *iter, uint64_t *digest);

#endif
