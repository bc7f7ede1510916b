// SPDX-License-Identifier: BSD-2-Clause
/*
 * The kernel's own word on every open queue of every tun device: who holds it, which device it
 * belongs to, and which steering program is attached.  A task_file iterator sees every open file
 * of the host.
 *
 * A process can have one open file under as many fds as it is allowed.  What was reported of a
 * process lately is remembered, so that a queue is reported once or a few times, not once per fd;
 * whoever reads drops the rest.  Only the reader's own fds are all reported: it asks for one of
 * them by number.
 */
#include "tun_vnet.h"
#include "tun.h"

#define QS_RECENT 4096 /* a power of two; more than the queues of one process */

struct bpf_iter_meta___session {
	__u64 session_id; /* another one in every run */
} __attribute__((preserve_access_index));

struct qs_reported {
	__u64 tfile; /* of one open file only */
	__u64 session;
	__u32 tgid;
	__u32 reserved;
};

struct qs_reported recent[QS_RECENT] = {};

static __always_inline struct qs_reported *qs_place_of(__u64 tfile, __u32 tgid)
{
	__u64 hash = (tfile ^ tgid) * QS_FACTOR;

	return &recent[hash >> 32 & (QS_RECENT - 1)];
}

SEC("iter/task_file")
int qsteer_tun_queues(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct qs_queue q = {};
	struct bpf_iter_meta___session *run = (void *)ctx->meta;
	struct qs_reported *reported;
	struct tun_file *tfile;
	struct tun_struct *tun;
	struct tun_prog *prog;
	struct net_device *dev;

	if (!task || !file || !qs_is_tun(ctx->fd, file))
		return 0;

	/* Read as a number: the verifier lets nobody calculate with what it knows as a pointer. */
	tfile = BPF_CORE_READ(file, private_data);
	reported = qs_place_of((__u64)tfile, task->tgid);
	if (reported->tfile == (__u64)tfile && reported->tgid == task->tgid &&
	    reported->session == run->session_id && task->tgid != bpf_get_current_pid_tgid() >> 32)
		return 0;
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
	q.header = BPF_CORE_READ(tun, vnet_hdr_sz);
	q.active = BPF_CORE_READ(tun, numqueues);
	q.disabled = BPF_CORE_READ(tun, numdisabled);
	q.queue_index = BPF_CORE_READ(tfile, queue_index);
	q.detached = BPF_CORE_READ(tfile, detached) != 0;
	prog = BPF_CORE_READ(tun, steering_prog);
	q.attachment = (__u64)prog;
	if (prog)
		q.prog_id = BPF_CORE_READ(prog, prog, aux, id);
	q.vnet_hash = qs_vnet_hash_digest(tun);
	BPF_CORE_READ_STR_INTO(&q.comm, task, group_leader, comm);
	BPF_CORE_READ_STR_INTO(&q.tap, dev, name);
	/* Where the reader's buffer is full, the kernel comes again with the same file. */
	if (bpf_seq_write(ctx->meta->seq, &q, sizeof(q)))
		return 0;
	reported->tfile = (__u64)tfile;
	reported->session = run->session_id;
	reported->tgid = task->tgid;
	return 0;
}
