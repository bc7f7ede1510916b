/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * tun devices as the kernel keeps them (drivers/net/tun.c), for the programs that look at them.
 *
 * Each structure is reduced to the members that are read: CO-RE finds the real offsets when a
 * program is loaded, in the module's BTF where tun is a module.
 *
 * Which open file of a process is one of tun's is told by its file operations.  Their address is
 * learnt first: one run over the caller's own process sees the fd (of /dev/net/tun) that the caller
 * has opened for this.
 */
#ifndef QS_TUN_H
#define QS_TUN_H

#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <stdbool.h>

#include "abi.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct seq_file;
struct file_operations;

struct file {
	const struct file_operations *f_op;
	void *private_data;
};

struct list_head {
	struct list_head *next;
};

struct ns_common {
	unsigned int inum;
	const void *ops;
};

struct net {
	struct list_head list;
	struct list_head dev_base_head;
	struct ns_common ns;
};

struct nsproxy {
	struct net *net_ns;
};

struct mm_struct {
	unsigned long arg_end;
};

struct task_struct {
	int tgid;
	struct mm_struct *mm;
	__u64 self_exec_id;
	char comm[16];
	struct task_struct *group_leader;
	struct nsproxy *nsproxy;
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	__u32 fd;
	struct file *file;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct rtnl_link_ops {
	const char *kind;
};

struct net_device {
	char name[16];
	int ifindex;
	possible_net_t nd_net;
	struct list_head dev_list;
	const struct rtnl_link_ops *rtnl_link_ops;
	unsigned char priv[]; /* since Linux 6.10 */
};

struct bpf_prog_aux {
	__u32 id;
};

struct bpf_prog {
	struct bpf_prog_aux *aux;
};

struct tun_prog {
	struct bpf_prog *prog;
};

struct tun_file;

struct tun_struct {
	struct tun_file *tfiles[256];
	unsigned int numqueues;
	unsigned int flags;
	struct net_device *dev;
	unsigned int numdisabled;
	struct list_head disabled;
	int vnet_hdr_sz;
	struct tun_prog *steering_prog;
};

struct tun_file {
	struct tun_struct *tun;
	__u16 queue_index;
	struct list_head next;
	struct tun_struct *detached;
};

#pragma clang attribute pop

#define QS_FACTOR 0x9e3779b97f4a7c15ULL

static __always_inline __u64 qs_fold(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * QS_FACTOR;
	return hash ^ hash >> 32;
}

const volatile __u32 learner_fd = 0;
struct qs_tun_state state = {};

/* Whether an open file is one of tun's; the first run only learns. */
static __always_inline bool qs_is_tun(__u32 fd, const struct file *file)
{
	if (!state.tun_fops) {
		if (fd == learner_fd)
			state.tun_fops = (__u64)file->f_op;
		return false;
	}
	return (__u64)file->f_op == state.tun_fops;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#endif
