// SPDX-License-Identifier: BSD-2-Clause
/*
 * The kernel's own word on what every tun device that somebody has open hashes by itself: one
 * struct qs_vnet_hash for each open queue of a device that does.
 */
#include "tun_vnet.h"
#include "tun.h"

SEC("iter/task_file")
int qsteer_tun_vnet(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct qs_vnet_hash found = {};
	const void *key, *table;
	struct tun_file *tfile;
	struct net_device *dev;
	struct tun_struct *tun;

	if (!task || !file || !qs_is_tun(ctx->fd, file))
		return 0;
	/* Read as a number: the verifier lets nobody calculate with what it knows as a pointer. */
	tfile = BPF_CORE_READ(file, private_data);
	tun = BPF_CORE_READ(tfile, tun);
	if (!tun || !qs_vnet_hash_of(tun, &found, &key, &table))
		return 0;
	dev = BPF_CORE_READ(tun, dev);
	found.netns = BPF_CORE_READ(dev, nd_net.net, ns.inum);
	found.ifindex = BPF_CORE_READ(dev, ifindex);
	if (found.rss) {
		__u32 bytes = 2 * found.entries;

		bpf_probe_read_kernel(found.key, sizeof(found.key), key);
		if (bytes > sizeof(found.table))
			bytes = sizeof(found.table);
		bpf_probe_read_kernel(found.table, bytes, table);
	}
	bpf_seq_write(ctx->meta->seq, &found, sizeof(found));
	return 0;
}
