// SPDX-License-Identifier: BSD-2-Clause
/*
 * The kernel's own word on every open queue of every tun device: who holds it, which device it
 * belongs to, and which steering program is attached.  A task_file iterator sees every open file
 * of the host.
 */
#include "tun.h"

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

	if (!task || !file || !qs_is_tun(ctx->fd, file))
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
