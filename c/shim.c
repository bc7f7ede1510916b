// SPDX-License-Identifier: BSD-2-Clause
#define _GNU_SOURCE
#include "shim.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/magic.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "auto.h"
#include "bpf/handover.h"
#include "stub.h"

#define QS_FDS_MAX 16

static void qs_close_object(struct bpf_object **object)
{
	bpf_object__close(*object);
}

#define qs_auto_object __attribute__((cleanup(qs_close_object)))

static int qs_result(int ret)
{
	return ret < 0 ? -errno : 0;
}

/* tun/tap */

int qs_tap_open(char name[16], int exclusive, int *fd)
{
	struct ifreq ifr = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE };
	qs_auto_close int tun = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);

	if (tun < 0)
		return -errno;
	if (exclusive)
		ifr.ifr_flags |= IFF_TUN_EXCL;
	memcpy(ifr.ifr_name, name, sizeof(ifr.ifr_name) - 1);
	if (ioctl(tun, TUNSETIFF, &ifr) < 0)
		return -errno;
	/* Without an owner, whoever can open /dev/net/tun (mode 0666, mostly) may add queues. */
	if (exclusive && ioctl(tun, TUNSETOWNER, (unsigned long)geteuid()) < 0)
		return -errno;
	memcpy(name, ifr.ifr_name, sizeof(ifr.ifr_name));
	*fd = qs_take(&tun);
	return 0;
}

int qs_tap_name(int fd, char name[16])
{
	struct ifreq ifr = {};

	if (ioctl(fd, TUNGETIFF, &ifr) < 0)
		return -errno;
	memcpy(name, ifr.ifr_name, sizeof(ifr.ifr_name));
	return 0;
}

int qs_tap_flags(int fd, __u32 *flags)
{
	struct ifreq ifr = {};

	if (ioctl(fd, TUNGETIFF, &ifr) < 0)
		return -errno;
	*flags = (__u16)ifr.ifr_flags;
	return 0;
}

int qs_steering_attach(int fd, int prog_fd)
{
	return qs_result(ioctl(fd, TUNSETSTEERINGEBPF, &prog_fd));
}

int qs_steering_detach(int fd)
{
	int none = -1;

	return qs_result(ioctl(fd, TUNSETSTEERINGEBPF, &none));
}

/* Processes and privileges */

int qs_pidfd_getfd(int pidfd, int target, int *fd)
{
	int got = syscall(SYS_pidfd_getfd, pidfd, target, 0);

	if (got < 0)
		return -errno;
	*fd = got;
	return 0;
}

int qs_netns_enter(int netns_fd)
{
	return setns(netns_fd, CLONE_NEWNET) < 0 ? -errno : 0;
}

int qs_fds_send(int sock, const int *fds, size_t count)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int) * QS_FDS_MAX)];
		struct cmsghdr align;
	} control = {};
	char byte = 0;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	struct cmsghdr *cmsg;

	if (count < 1 || count > QS_FDS_MAX)
		return -EINVAL;
	msg.msg_control = control.bytes;
	msg.msg_controllen = CMSG_SPACE(sizeof(int) * count);
	cmsg = CMSG_FIRSTHDR(&msg);
	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int) * count);
	memcpy(CMSG_DATA(cmsg), fds, sizeof(int) * count);
	return qs_result(sendmsg(sock, &msg, MSG_NOSIGNAL));
}

int qs_fds_receive(int sock, int *fds, size_t count)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int) * QS_FDS_MAX)];
		struct cmsghdr align;
	} control = {};
	char byte;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr msg = { .msg_iov = &iov,
			      .msg_iovlen = 1,
			      .msg_control = control.bytes,
			      .msg_controllen = sizeof(control.bytes) };
	size_t got = 0;
	int received[QS_FDS_MAX];
	struct cmsghdr *cmsg;
	ssize_t n;

	if (count < 1 || count > QS_FDS_MAX)
		return -EINVAL;
	n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);
	if (n < 0)
		return -errno;
	for (cmsg = CMSG_FIRSTHDR(&msg); cmsg; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
		size_t here = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
			continue;
		memcpy(received + got, CMSG_DATA(cmsg), here * sizeof(int));
		got += here;
	}
	if (n != 1 || got != count || (msg.msg_flags & MSG_CTRUNC)) {
		while (got)
			close(received[--got]);
		return -EBADMSG;
	}
	memcpy(fds, received, count * sizeof(int));
	return 0;
}

int qs_capabilities_drop(void)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {};

	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
		return -errno;
	return qs_result(syscall(SYS_capset, &header, none));
}

int qs_capabilities_limit(uint64_t keep)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
	    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
		return -errno;
	/* Without CAP_SETPCAP the bounding set stays: it is for programs that are executed. */
	for (int number = 0; prctl(PR_CAPBSET_READ, number, 0, 0, 0) >= 0; number++)
		if (!(keep >> number & 1) && prctl(PR_CAPBSET_DROP, number, 0, 0, 0) < 0 &&
		    errno != EPERM)
			return -errno;
	if (syscall(SYS_capget, &header, data) < 0)
		return -errno;
	for (int i = 0; i < _LINUX_CAPABILITY_U32S_3; i++) {
		data[i].permitted &= (__u32)(keep >> 32 * i);
		data[i].effective &= data[i].permitted;
		data[i].inheritable = 0;
	}
	return qs_result(syscall(SYS_capset, &header, data));
}

int qs_capabilities_effective(uint64_t *set)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {};

	if (syscall(SYS_capget, &header, data) < 0)
		return -errno;
	*set = (uint64_t)data[1].effective << 32 | data[0].effective;
	return 0;
}

int qs_lock_writer(int fd, int *pid)
{
	/* A lock for reading is in the way of locks for writing only. */
	struct flock lock = { .l_type = F_RDLCK, .l_whence = SEEK_SET };

	if (fcntl(fd, F_GETLK, &lock) < 0)
		return -errno;
	*pid = lock.l_type == F_WRLCK ? lock.l_pid : 0;
	return 0;
}

int qs_bpffs_mount(const char *path)
{
	struct statfs fs;

	if (statfs(path, &fs) < 0)
		return -errno;
	if (fs.f_type == BPF_FS_MAGIC)
		return 0;
	return qs_result(mount("bpf", path, "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700"));
}

/* What libbpf says */

static char qs_log[256 * 1024];
static size_t qs_log_len;

__attribute__((format(printf, 2, 0))) static int qs_log_print(enum libbpf_print_level level,
							      const char *format, va_list args)
{
	size_t room = sizeof(qs_log) - qs_log_len;
	int n;

	if (level == LIBBPF_DEBUG)
		return 0;
	n = vsnprintf(qs_log + qs_log_len, room, format, args);
	if (n > 0)
		qs_log_len += (size_t)n < room ? (size_t)n : room - 1;
	return n;
}

void qs_log_say(const char *text)
{
	size_t room = sizeof(qs_log) - qs_log_len;
	int n = snprintf(qs_log + qs_log_len, room, "%s\n", text);

	if (n > 0)
		qs_log_len += (size_t)n < room ? (size_t)n : room - 1;
}

const char *qs_log_take(void)
{
	static char taken[sizeof(qs_log)];

	memcpy(taken, qs_log, qs_log_len);
	taken[qs_log_len] = '\0';
	qs_log_len = 0;
	return taken;
}

/* Programs */

static int qs_object_open(const char *path, struct bpf_object **object)
{
	libbpf_set_print(qs_log_print);
	*object = bpf_object__open_file(path, NULL);
	return *object ? 0 : -errno;
}

static int qs_dup(int fd, int *out)
{
	*out = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	return *out < 0 ? -errno : 0;
}

static int qs_only_program(struct bpf_object *object, int *fd)
{
	struct bpf_program *prog = bpf_object__next_program(object, NULL);

	return prog ? qs_dup(bpf_program__fd(prog), fd) : -ENOENT;
}

static int qs_map(struct bpf_object *object, const char *name, int *fd)
{
	int found = bpf_object__find_map_fd_by_name(object, name);

	return found < 0 ? found : qs_dup(found, fd);
}

static int qs_prog_info(int fd, struct bpf_prog_info *info)
{
	__u32 len = sizeof(*info);

	return bpf_obj_get_info_by_fd(fd, info, &len);
}

static struct bpf_map *qs_rodata(struct bpf_object *object)
{
	struct bpf_map *map;

	bpf_object__for_each_map(map, object) {
		const char *name = bpf_map__name(map);
		size_t len = strlen(name), suffix = strlen(".rodata");

		if (len >= suffix && !strcmp(name + len - suffix, ".rodata"))
			return map;
	}
	return NULL;
}

/* Put a map that is there already in place of one of the object's. */
static int qs_map_reuse(struct bpf_object *object, int which, const char *name, int fd)
{
	struct bpf_map *map = bpf_object__find_map_by_name(object, name);
	int err = map ? qs_rss_map_check(which, fd) : -EINVAL;

	return err ? err : bpf_map__reuse_fd(map, fd);
}

int qs_program_load(const char *path, const struct qs_ident *ident, const int *map_fds,
		    struct qs_program *program)
{
	qs_auto_object struct bpf_object *object = NULL;
	qs_auto_close int prog = -1, config = -1, key = -1, table = -1;
	struct bpf_prog_info info = {};
	struct bpf_map *rodata;
	int err;

	err = qs_object_open(path, &object);
	if (err)
		return err;
	rodata = qs_rodata(object);
	if (!rodata)
		return -EINVAL;
	err = bpf_map__set_initial_value(rodata, ident, sizeof(*ident));
	if (err)
		return err;
	if (map_fds &&
	    ((err = qs_map_reuse(object, QS_CONFIG, QS_MAP_CONFIG, map_fds[QS_CONFIG])) ||
	     (err = qs_map_reuse(object, QS_KEY, QS_MAP_KEY, map_fds[QS_KEY])) ||
	     (err = qs_map_reuse(object, QS_TABLE, QS_MAP_TABLE, map_fds[QS_TABLE]))))
		return err;
	err = bpf_object__load(object);
	if (err)
		return err;
	if ((err = qs_only_program(object, &prog)) ||
	    (err = qs_map(object, QS_MAP_CONFIG, &config)) ||
	    (err = qs_map(object, QS_MAP_KEY, &key)) ||
	    (err = qs_map(object, QS_MAP_TABLE, &table)) || (err = qs_prog_info(prog, &info)))
		return err;
	program->id = info.id;
	program->prog_fd = qs_take(&prog);
	program->config_fd = qs_take(&config);
	program->key_fd = qs_take(&key);
	program->table_fd = qs_take(&table);
	return 0;
}

int qs_bodies_refill(int bodies_fd, const char *path)
{
	qs_auto_object struct bpf_object *object = NULL;
	qs_auto_close int body = -1;
	__u32 slot = QS_BODY_TAP;
	int err;

	if ((err = qs_object_open(path, &object)) || (err = bpf_object__load(object)) ||
	    (err = qs_only_program(object, &body)))
		return err;
	return bpf_map_update_elem(bodies_fd, &slot, &body, BPF_ANY);
}

int qs_bodies_create(const char *path, int *bodies_fd)
{
	qs_auto_close int bodies = -1;
	int err;

	bodies = bpf_map_create(BPF_MAP_TYPE_PROG_ARRAY, QS_BODIES, sizeof(__u32), sizeof(__u32),
				QS_BODIES_ENTRIES, NULL);
	if (bodies < 0)
		return bodies;
	err = qs_bodies_refill(bodies, path);
	if (err)
		return err;
	*bodies_fd = qs_take(&bodies);
	return 0;
}

int qs_pin(int fd, const char *path)
{
	return bpf_obj_pin(fd, path);
}

int qs_pinned(const char *path, int *fd)
{
	int got = bpf_obj_get(path);

	if (got < 0)
		return got;
	*fd = got;
	return 0;
}

int qs_bodies_program(int bodies_fd, __u32 *id)
{
	__u32 slot = QS_BODY_TAP, found = 0;
	int err = bpf_map_lookup_elem(bodies_fd, &slot, &found);

	if (err && err != -ENOENT)
		return err;
	*id = found;
	return 0;
}

int qs_program_fd(__u32 id, int *fd)
{
	int got = bpf_prog_get_fd_by_id(id);

	if (got < 0)
		return got;
	*fd = got;
	return 0;
}

int qs_map_fd(__u32 id, int *fd)
{
	int got = bpf_map_get_fd_by_id(id);

	if (got < 0)
		return got;
	*fd = got;
	return 0;
}

int qs_program_next_id(__u32 after, __u32 *id)
{
	__u32 next = 0;
	int err = bpf_prog_get_next_id(after, &next);

	if (!err)
		*id = next;
	return err;
}

int qs_program_maps(int prog_fd, __u32 *ids, __u32 *count)
{
	struct bpf_prog_info info = { .nr_map_ids = QS_PROGRAM_MAPS, .map_ids = (__u64)ids };
	int err = qs_prog_info(prog_fd, &info);

	if (!err)
		*count = info.nr_map_ids < QS_PROGRAM_MAPS ? info.nr_map_ids : QS_PROGRAM_MAPS;
	return err;
}

/* The kernel describes a program where a map was expected, and does not say so. */
static bool qs_is_map(int fd)
{
	char path[32], kind[32] = "";

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return readlink(path, kind, sizeof(kind) - 1) > 0 && !strcmp(kind, "anon_inode:bpf-map");
}

int qs_map_info(int fd, __u32 *id, __u32 *type, char name[16])
{
	struct bpf_map_info info = {};
	__u32 len = sizeof(info);
	int err;

	if (!qs_is_map(fd))
		return -EBADMSG;
	err = bpf_obj_get_info_by_fd(fd, &info, &len);
	if (err)
		return err;
	*id = info.id;
	*type = info.type;
	memcpy(name, info.name, sizeof(info.name));
	return 0;
}

/* A name as the kernel keeps it: at most 15 characters. */
static bool qs_named(const char kept[16], const char *name)
{
	return !strncmp(kept, name, 15);
}

static bool qs_ends_with(const char kept[16], const char *suffix)
{
	size_t len = strnlen(kept, 16), n = strlen(suffix);

	return len >= n && !memcmp(kept + len - n, suffix, n);
}

/* A later version may know more of itself; what this one knows comes first. */
#define QS_RODATA_MAX 4096

/* Who a program says it is, and the configuration that it has with it. */
static void qs_rodata_tells(int fd, const struct bpf_map_info *map, struct qs_program_info *out)
{
	union {
		struct qs_ident ident;
		struct qs_frozen frozen;
		__u8 bytes[QS_RODATA_MAX];
	} rodata;
	__u32 zero = 0;

	if (map->value_size < sizeof(rodata.ident) || map->value_size > sizeof(rodata) ||
	    !(map->map_flags & BPF_F_RDONLY_PROG) || bpf_map_lookup_elem(fd, &zero, &rodata) ||
	    rodata.ident.magic != QS_MAGIC)
		return;
	out->ident = rodata.ident;
	out->has_ident = 1;
	if (map->value_size >= sizeof(struct qs_frozen) && rodata.frozen.layout == QS_FROZEN_LAYOUT)
		out->frozen_id = map->id;
}

/* What one of a program's maps says about the program. */
static void qs_map_tells(int fd, const struct bpf_map_info *map, struct qs_program_info *out)
{
	if (map->type == BPF_MAP_TYPE_PROG_ARRAY) {
		if (qs_named(map->name, QS_BODIES))
			out->bodies_id = map->id;
		return;
	}
	if (map->type != BPF_MAP_TYPE_ARRAY)
		return;
	if (qs_named(map->name, QS_MAP_CONFIG) && map->max_entries == 1 &&
	    map->value_size == sizeof(struct qs_rss_config))
		out->config_id = map->id;
	else if (qs_named(map->name, QS_MAP_KEY) && map->max_entries == 1 &&
		 map->value_size == QS_KEY_BYTES)
		out->key_id = map->id;
	else if (qs_named(map->name, QS_MAP_TABLE) && map->max_entries == QS_TABLE_ENTRIES &&
		 map->value_size == sizeof(__u16))
		out->table_id = map->id;
	else if (qs_ends_with(map->name, ".rodata"))
		qs_rodata_tells(fd, map, out);
}

int qs_program_info(int prog_fd, struct qs_program_info *out)
{
	__u32 map_ids[16] = {};
	struct bpf_prog_info info = { .nr_map_ids = 16, .map_ids = (__u64)map_ids };
	struct qs_program_info result = {};
	int err = qs_prog_info(prog_fd, &info);

	if (err)
		return err;
	result.id = info.id;
	result.type = info.type;
	result.loaded_ns = info.load_time;
	result.uid = info.created_by_uid;
	result.verified_insns = info.verified_insns;
	memcpy(result.tag, info.tag, sizeof(result.tag));
	memcpy(result.name, info.name, sizeof(result.name));
	for (__u32 i = 0; i < info.nr_map_ids && i < 16; i++) {
		qs_auto_close int fd = bpf_map_get_fd_by_id(map_ids[i]);
		struct bpf_map_info map = {};
		__u32 len = sizeof(map);

		if (fd < 0)
			return fd;
		err = bpf_obj_get_info_by_fd(fd, &map, &len);
		if (err)
			return err;
		qs_map_tells(fd, &map, &result);
	}
	*out = result;
	return 0;
}

/* The key map keeps its first four bytes as a number of the host's byte order. */
static void qs_key_swap_head(__u8 key[QS_KEY_BYTES])
{
	__u32 head = (__u32)key[0] << 24 | (__u32)key[1] << 16 | (__u32)key[2] << 8 | key[3];

	memcpy(key, &head, sizeof(head));
}

/* In one call: a host has a thousand tables. */
static int qs_table_read(int table_fd, __u16 *table)
{
	__u32 keys[QS_TABLE_ENTRIES], count = QS_TABLE_ENTRIES, next;
	int err = bpf_map_lookup_batch(table_fd, NULL, &next, keys, table, &count, NULL);

	/* -ENOENT: that was the last of it */
	if (err && err != -ENOENT)
		return err;
	return count == QS_TABLE_ENTRIES ? 0 : -EBADMSG;
}

int qs_config_read(int config_fd, int key_fd, int table_fd, struct qs_rss_config *config,
		   __u8 key[QS_KEY_BYTES], __u16 *table)
{
	struct qs_rss_key raw;
	__u32 zero = 0;
	int err;

	if ((err = bpf_map_lookup_elem(config_fd, &zero, config)) ||
	    (err = bpf_map_lookup_elem(key_fd, &zero, &raw)) ||
	    (err = qs_table_read(table_fd, table)))
		return err;
	key[0] = raw.leftmost_32_bits >> 24;
	key[1] = raw.leftmost_32_bits >> 16;
	key[2] = raw.leftmost_32_bits >> 8;
	key[3] = raw.leftmost_32_bits;
	memcpy(key + 4, raw.rest, sizeof(raw.rest));
	return 0;
}

int qs_frozen_read(int fd, struct qs_rss_config *config, __u8 key[QS_KEY_BYTES], __u16 *table)
{
	union {
		struct qs_frozen frozen;
		__u8 bytes[QS_RODATA_MAX];
	} rodata;
	struct bpf_map_info info = {};
	__u32 zero = 0, len = sizeof(info);
	int err = bpf_obj_get_info_by_fd(fd, &info, &len);

	if (err)
		return err;
	if (info.value_size < sizeof(rodata.frozen) || info.value_size > sizeof(rodata))
		return -EBADMSG;
	err = bpf_map_lookup_elem(fd, &zero, &rodata);
	if (err)
		return err;
	if (rodata.frozen.layout != QS_FROZEN_LAYOUT)
		return -EBADMSG;
	*config = rodata.frozen.config;
	memcpy(key, rodata.frozen.key, QS_KEY_BYTES);
	memcpy(table, rodata.frozen.table, sizeof(rodata.frozen.table));
	return 0;
}

static int qs_table_write(int table_fd, const __u16 *table)
{
	__u32 keys[QS_TABLE_ENTRIES], count = QS_TABLE_ENTRIES;

	for (__u32 i = 0; i < QS_TABLE_ENTRIES; i++)
		keys[i] = i;
	return bpf_map_update_batch(table_fd, keys, table, &count, NULL);
}

int qs_config_write(int config_fd, int key_fd, int table_fd, const struct qs_rss_config *config,
		    const __u8 key[QS_KEY_BYTES], const __u16 *table)
{
	__u8 raw[QS_KEY_BYTES];
	__u32 zero = 0;
	int err;

	memcpy(raw, key, sizeof(raw));
	qs_key_swap_head(raw);
	if ((err = bpf_map_update_elem(key_fd, &zero, raw, BPF_ANY)) ||
	    (err = qs_table_write(table_fd, table)))
		return err;
	return bpf_map_update_elem(config_fd, &zero, config, BPF_ANY);
}

int qs_program_run(int prog_fd, const void *packet, __u32 len, __u32 repeat, __u32 *answer,
		   __u32 *cb_left, __u32 *duration_ns)
{
	struct __sk_buff before = {}, after = {};
	LIBBPF_OPTS(bpf_test_run_opts, opts, .data_in = packet, .data_size_in = len,
		    .ctx_in = &before, .ctx_size_in = sizeof(before), .ctx_out = &after,
		    .ctx_size_out = sizeof(after), .repeat = repeat);
	int err = bpf_prog_test_run_opts(prog_fd, &opts);

	if (err)
		return err;
	*answer = opts.retval;
	*cb_left = 0;
	for (size_t i = 0; i < sizeof(after.cb) / sizeof(after.cb[0]); i++)
		*cb_left |= after.cb[i] != 0;
	*duration_ns = opts.duration;
	return 0;
}

/* What is attached */

/* One run of an iterator, over one process or (pid 0) all; records go to *records if that is given. */
static int qs_iterate(struct bpf_program *prog, pid_t pid, void **records, size_t *size)
{
	union bpf_iter_link_info info = { .task.pid = pid };
	LIBBPF_OPTS(bpf_iter_attach_opts, opts, .link_info = &info, .link_info_len = sizeof(info));
	struct bpf_link *link = bpf_program__attach_iter(prog, pid ? &opts : NULL);
	qs_auto_close int iter = -1;
	size_t used = 0, room = 0;
	char *bytes = NULL;
	int err = 0;

	if (!link)
		return -errno;
	iter = bpf_iter_create(bpf_link__fd(link));
	bpf_link__destroy(link);
	if (iter < 0)
		return iter;
	for (;;) {
		ssize_t n;

		if (used == room) {
			char *more = realloc(bytes, room + 64 * 1024);

			if (!more) {
				err = -ENOMEM;
				break;
			}
			bytes = more;
			room += 64 * 1024;
		}
		n = read(iter, bytes + used, room - used);
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			continue;
		if (n < 0)
			err = -errno;
		if (n <= 0)
			break;
		used += n;
	}
	if (err || !records) {
		free(bytes);
		return err;
	}
	*records = bytes;
	*size = used;
	return 0;
}

struct qs_tun_iter {
	struct bpf_object *object;
	struct bpf_program *files;   /* goes over the open files */
	struct bpf_program *devices; /* goes over the network devices; NULL where there is none */
	int state_fd;		     /* struct qs_tun_state */
};

static struct bpf_program *qs_program_of(struct bpf_object *object, enum bpf_prog_type type)
{
	struct bpf_program *prog;

	bpf_object__for_each_program(prog, object) {
		if (bpf_program__type(prog) == type)
			return prog;
	}
	return NULL;
}

int qs_tun_iter_open(const char *path, int tun_fd, struct qs_tun_iter **iter)
{
	qs_auto_object struct bpf_object *object = NULL;
	struct qs_tun_iter found = {}, *made;
	__u32 learner = tun_fd;
	struct bpf_map *rodata, *state;
	int err;

	err = qs_object_open(path, &object);
	if (err)
		return err;
	rodata = qs_rodata(object);
	state = bpf_object__find_map_by_name(object, ".bss");
	found.files = qs_program_of(object, BPF_PROG_TYPE_TRACING);
	found.devices = qs_program_of(object, BPF_PROG_TYPE_RAW_TRACEPOINT);
	if (!rodata || !state || !found.files)
		return -EINVAL;
	if ((err = bpf_map__set_initial_value(rodata, &learner, sizeof(learner))) ||
	    (err = bpf_object__load(object)) ||
	    (err = qs_iterate(found.files, getpid(), NULL, NULL)))
		return err;
	made = malloc(sizeof(*made));
	if (!made)
		return -ENOMEM;
	found.state_fd = bpf_map__fd(state);
	found.object = object;
	object = NULL;
	*made = found;
	*iter = made;
	return 0;
}

void qs_tun_iter_close(struct qs_tun_iter *iter)
{
	bpf_object__close(iter->object);
	free(iter);
}

int qs_tun_iter_read(struct qs_tun_iter *iter, int pid, void **records, size_t *size)
{
	return qs_iterate(iter->files, pid, records, size);
}

static int qs_tun_state_of(struct qs_tun_iter *iter, struct qs_tun_state *state)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(iter->state_fd, &zero, state);
}

int qs_tun_digest_devices(struct qs_tun_iter *iter, uint64_t *digest)
{
	LIBBPF_OPTS(bpf_test_run_opts, opts);
	struct qs_tun_state state;
	int err;

	if (!iter->devices)
		return -EINVAL;
	if ((err = bpf_prog_test_run_opts(bpf_program__fd(iter->devices), &opts)) ||
	    (err = qs_tun_state_of(iter, &state)))
		return err;
	*digest = state.digest;
	return 0;
}

int qs_tun_digest_holders(struct qs_tun_iter *iter, uint64_t *digest)
{
	struct qs_tun_state state;
	__u32 zero = 0;
	int err;

	if (!iter->devices)
		return -EINVAL;
	if ((err = qs_tun_state_of(iter, &state)))
		return err;
	state.digest = 0;
	if ((err = bpf_map_update_elem(iter->state_fd, &zero, &state, BPF_ANY)) ||
	    (err = qs_iterate(iter->files, 0, NULL, NULL)) || (err = qs_tun_state_of(iter, &state)))
		return err;
	*digest = state.digest;
	return 0;
}

void qs_free(void *memory)
{
	free(memory);
}
