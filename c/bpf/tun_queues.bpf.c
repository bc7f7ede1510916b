// SPDX-License-Identifier: BSD-2-Clause
/*
 * The kernel's own word on every open queue of every tun device: who holds it, which device it
 * belongs to, and which steering program is attached.
 *
 * Theory of operation
 *
 * A task_file iterator sees every open file of the host.  Those of tun are told by their file
 * operations, whose address is learnt first: one run over the caller's own process, limited to the
 * fd (of /dev/net/tun) that the caller opened for this, fills tun_fops; the run over all processes
 * then reports.  The structures are those of drivers/net/tun.c; where tun is a module, libbpf finds
 * them in the module's BTF.
 */
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

struct task_struct {
	int tgid;
	char comm[16];
	struct task_struct *group_leader;
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

struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct net_device {
	char name[16];
	int ifindex;
	possible_net_t nd_net;
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

struct tun_struct {
	unsigned int numqueues;
	unsigned int flags;
	struct net_device *dev;
	unsigned int numdisabled;
	struct tun_prog *steering_prog;
};

struct tun_file {
	struct tun_struct *tun;
	__u16 queue_index;
	struct tun_struct *detached;
};

#pragma clang attribute pop

const volatile __u32 learner_fd = 0;
__u64 tun_fops = 0;

SEC("iter/task_file")
int qsteer_tun_queues(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct qs_queue q = {};
	struct tun_file *tfile;
	struct tun_struct *tun;
	struct tun_prog *prog;
	struct net_device *dev;

	if (!task || !file)
		return 0;
	if (!tun_fops) {
		if (ctx->fd == learner_fd)
			tun_fops = (__u64)file->f_op;
		return 0;
	}
	if ((__u64)file->f_op != tun_fops)
		return 0;

	tfile = file->private_data;
	tun = BPF_CORE_READ(tfile, tun);
	if (!tun)
		return 0;
	dev = BPF_CORE_READ(tun, dev);

	q.file = (__u64)file;
	q.pid = task->tgid;
	q.fd = ctx->fd;
	q.netns = BPF_CORE_READ(dev, nd_net.net, ns.inum);
	q.ifindex = BPF_CORE_READ(dev, ifindex);
	q.flags = BPF_CORE_READ(tun, flags);
	q.active = BPF_CORE_READ(tun, numqueues);
	q.disabled = BPF_CORE_READ(tun, numdisabled);
	q.queue_index = BPF_CORE_READ(tfile, queue_index);
	q.detached = BPF_CORE_READ(tfile, detached) != 0;
	prog = BPF_CORE_READ(tun, steering_prog);
	q.attachment = (__u64)prog;
	if (prog)
		q.prog_id = BPF_CORE_READ(prog, prog, aux, id);
	BPF_CORE_READ_STR_INTO(&q.comm, task, group_leader, comm);
	BPF_CORE_READ_STR_INTO(&q.tap, dev, name);
	bpf_seq_write(ctx->meta->seq, &q, sizeof(q));
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
