// SPDX-License-Identifier: BSD-2-Clause
/*
 * Two numbers that tell whether anything about taps has changed, without a word on what.
 *
 * Theory of operation
 *
 * A digest is the sum of one well mixed 64-bit hash per record, so that the order in which the
 * kernel keeps things makes no difference.  No record leaves the kernel.
 *
 * qsteer_digest_devices walks the network devices of all network namespaces, under RCU, as the
 * kernel's own dumps do: every tap, what is attached to it, and its queues, persistent taps that
 * nobody holds included.  Its cost grows with the number of devices; it does not look at processes
 * and their open files, of which a host with a thousand VMs has a hundred thousand.
 *
 * qsteer_digest_holders goes over those files all the same, and so costs far more.  It folds only
 * what the first one cannot see: which process holds which queue, and which program that process
 * runs.  Who starts a QEMU opens its taps, forks, and becomes QEMU only then.
 *
 * What is walked may change meanwhile.  Everything that is listed under RCU (namespaces, devices,
 * queues in use) stays readable; the list of queues that are not in use is guarded by a lock that
 * a program cannot take.  All reads are checked ones, and all loops are bounded: at worst a digest
 * is one of a state that never was, and the next one differs from it.
 */
#include "tun_vnet.h"
#include "tun.h"

#include <linux/if_tun.h>

#define QS_NAMESPACES_MAX (1 << 16)
#define QS_DEVICES_MAX (1 << 20)
#define QS_QUEUES_MAX 256
#define QS_DEVICE_ALIGN 32 /* NETDEV_ALIGN */

/* Every bit of the last word reaches every bit of what is summed. */
static __always_inline __u64 qs_finish(__u64 hash)
{
	return qs_fold(qs_fold(hash, 1), 2);
}

struct qs_walk {
	struct list_head *net;		 /* where the walk over the namespaces is */
	struct list_head *own;		 /* where it began, and ends */
	const void *net_ops;		 /* what every namespace has */
	struct list_head *dev;		 /* where the walk over a namespace's devices is */
	struct list_head *head;		 /* in the namespace itself */
	const struct rtnl_link_ops *tun; /* what every tun device has; NULL until one is seen */
	__u64 netns;
};

static __always_inline bool qs_is_tun_device(struct qs_walk *walk, struct net_device *dev)
{
	const struct rtnl_link_ops *ops = BPF_CORE_READ(dev, rtnl_link_ops);
	char start[4] = {};

	if (!ops || walk->tun)
		return ops && ops == walk->tun;
	/* No second driver can register a kind of link that is taken. */
	if (bpf_probe_read_kernel(start, sizeof(start), BPF_CORE_READ(ops, kind)) ||
	    start[0] != 't' || start[1] != 'u' || start[2] != 'n' || start[3])
		return false;
	walk->tun = ops;
	return true;
}

/* netdev_priv() */
static __always_inline struct tun_struct *qs_tun_of(struct net_device *dev)
{
	__u64 size;

	if (bpf_core_field_exists(dev->priv))
		return (void *)dev + bpf_core_field_offset(dev->priv);
	size = bpf_core_type_size(struct net_device);
	return (void *)dev + ((size + QS_DEVICE_ALIGN - 1) & ~(QS_DEVICE_ALIGN - 1ULL));
}

static __always_inline __u64 qs_fold_queues(__u64 hash, struct tun_struct *tun)
{
	__u32 active = BPF_CORE_READ(tun, numqueues), disabled = BPF_CORE_READ(tun, numdisabled);
	struct list_head *next;
	struct tun_file *tfile;

	for (__u32 i = 0; i < QS_QUEUES_MAX && i < active; i++) {
		tfile = NULL;
		bpf_core_read(&tfile, sizeof(tfile), &tun->tfiles[i]);
		hash = qs_fold(hash, (__u64)tfile);
	}
	next = BPF_CORE_READ(tun, disabled.next);
	for (__u32 i = 0; i < QS_QUEUES_MAX && i < disabled; i++) {
		hash = qs_fold(hash, (__u64)next);
		next = BPF_CORE_READ(next, next);
	}
	return hash;
}

static __always_inline void qs_add_device(struct qs_walk *walk, struct net_device *dev)
{
	struct tun_struct *tun;
	struct tun_prog *prog;
	__u64 name[2] = {}, hash;
	__u32 flags;

	if (!qs_is_tun_device(walk, dev))
		return;
	tun = qs_tun_of(dev);
	flags = BPF_CORE_READ(tun, flags);
	if (!(flags & IFF_TAP))
		return;
	BPF_CORE_READ_INTO(&name, dev, name);
	prog = BPF_CORE_READ(tun, steering_prog);
	hash = qs_fold(QS_MAGIC, name[0]);
	hash = qs_fold(hash, name[1]);
	hash = qs_fold(hash, walk->netns);
	hash = qs_fold(hash, (__u64)BPF_CORE_READ(dev, ifindex) << 32 | flags);
	hash = qs_fold(hash, (__u64)prog);
	if (prog)
		hash = qs_fold(hash, BPF_CORE_READ(prog, prog, aux, id));
	hash = qs_fold(hash, qs_vnet_hash_digest(tun));
	hash = qs_fold(hash, BPF_CORE_READ(tun, vnet_hdr_sz));
	state.digest += qs_finish(qs_fold_queues(hash, tun));
}

static long qs_step_device(__u32 i, struct qs_walk *walk)
{
	struct list_head *at = walk->dev;

	if (!at || at == walk->head)
		return 1;
	qs_add_device(walk, (void *)at - bpf_core_field_offset(struct net_device, dev_list));
	walk->dev = BPF_CORE_READ(at, next);
	return 0;
}

/* The list's own head is passed, too, which is in no namespace and so lacks their operations. */
static long qs_step_namespace(__u32 i, struct qs_walk *walk)
{
	struct net *net = (void *)walk->net - bpf_core_field_offset(struct net, list);

	if (BPF_CORE_READ(net, ns.ops) == walk->net_ops) {
		walk->netns = BPF_CORE_READ(net, ns.inum);
		walk->head = (void *)net + bpf_core_field_offset(struct net, dev_base_head);
		walk->dev = BPF_CORE_READ(net, dev_base_head.next);
		bpf_loop(QS_DEVICES_MAX, qs_step_device, walk, 0);
	}
	walk->net = BPF_CORE_READ(net, list.next);
	return !walk->net || walk->net == walk->own;
}

/* Attached to nothing; BPF_PROG_TEST_RUN runs it under RCU. */
SEC("raw_tp")
int qsteer_digest_devices(void *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct net *net = BPF_CORE_READ(task, nsproxy, net_ns);
	struct qs_walk walk = { .net_ops = BPF_CORE_READ(net, ns.ops) };

	state.digest = 0;
	walk.own = walk.net = (void *)net + bpf_core_field_offset(struct net, list);
	bpf_loop(QS_NAMESPACES_MAX, qs_step_namespace, &walk, 0);
	return 0;
}

SEC("iter/task_file")
int qsteer_digest_holders(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct tun_file *tfile;
	struct tun_struct *tun;
	__u64 hash;

	if (!task || !file || !qs_is_tun(ctx->fd, file))
		return 0;
	/* Read as a number: the verifier lets nobody calculate with what it knows as a pointer. */
	tfile = BPF_CORE_READ(file, private_data);
	tun = BPF_CORE_READ(tfile, tun);
	if (!tun)
		return 0;
	hash = qs_fold(QS_MAGIC, (__u64)tfile);
	hash = qs_fold(hash, (__u64)tun);
	hash = qs_fold(hash, task->tgid);
	/* The first changes before there is a new command line, the second with it. */
	hash = qs_fold(hash, BPF_CORE_READ(task, self_exec_id));
	hash = qs_fold(hash, BPF_CORE_READ(task, mm, arg_end));
	state.digest += qs_finish(hash);
	return 0;
}
