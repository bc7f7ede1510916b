/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What tun.c calls (tun.patch); it is included there behind what is used here.
 *
 * The state of a device changes as a whole, under rtnl; packets read it under RCU.  What differs
 * from one generation to the next:
 *
 *   TUN_HASH_OR_EBPF			RSS and a steering eBPF keep each other out: -EBUSY;
 *   TUN_HASH_REPORT_TAKES_HEADER	reports are refused, with -EBUSY, where there is no place
 *					for them; else they begin when there is;
 *   TUN_HASH_EBPF_FALLBACK		a steering eBPF may leave a packet to what is behind it.
 */
#ifndef TUN_HASH_OPS_H
#define TUN_HASH_OPS_H

#define TUN_STEERINGEBPF_FALLBACK U32_MAX

/*
 * What is reported of a packet, in its cb.
 *
 * It is hashed again when it is put into the ring, since what ndo_select_queue leaves in cb does
 * not last: the qdisc's is in between, and ndo_select_queue is not called for a single queue.  From
 * the ring on cb is nobody's: the packet is ours alone (tun takes no shared ones), no program runs
 * on it any more, and a clone for a time stamp has a cb of its own.
 */
struct tun_hash_cb {
	u32 value;
	u16 report;
};

/* The virtio header behind struct virtio_net_hdr. */
struct tun_hash_tail {
	__le16 num_buffers;
	__le32 hash_value;
	__le16 hash_report;
	__le16 padding;
} __packed;

#define TUN_HASH_HEADER (sizeof(struct virtio_net_hdr) + sizeof(struct tun_hash_tail))

static struct tun_hash_cb *tun_hash_cb(const struct sk_buff *skb)
{
	BUILD_BUG_ON(sizeof(struct tun_hash_cb) > sizeof(skb->cb));
	BUILD_BUG_ON(TUN_HASH_HEADER != 20);
	return (struct tun_hash_cb *)skb->cb;
}

/* All is off where there is no state.  Key and table are there as long as RCU, or rtnl, is held. */
static struct tun_hash_view tun_hash_view(const TUN_HASH_STATE *state)
{
	struct tun_hash_view view = {};

	if (state)
		tun_hash_look(state, &view);
	return view;
}

static struct tun_hash_view tun_hash_of(const struct tun_struct *tun)
{
	return tun_hash_view(rcu_dereference_rtnl(tun->TUN_HASH_MEMBER));
}

/* Whether a steering eBPF cannot be attached.  Under rtnl. */
static bool tun_hash_keeps_ebpf_out(const struct tun_struct *tun)
{
	return TUN_HASH_OR_EBPF && tun_hash_of(tun).rss;
}

/* The requests that change a device's state, among those that nobody else knows.  Under rtnl. */
static long tun_hash_ioctl(struct tun_struct *tun, unsigned int cmd, const void __user *argp)
{
	TUN_HASH_STATE *old, *new;
	struct tun_hash_view view;

	if (!tun_hash_is_set(cmd))
		return -EINVAL;
	new = tun_hash_copy(cmd, argp);
	if (IS_ERR(new))
		return PTR_ERR(new);

	view = tun_hash_view(new);
	if ((TUN_HASH_OR_EBPF && view.rss && rcu_access_pointer(tun->steering_prog)) ||
	    (TUN_HASH_REPORT_TAKES_HEADER && view.report &&
	     (tun->vnet_hdr_sz < TUN_HASH_HEADER || !tun_is_little_endian(tun)))) {
		kfree(new);
		return -EBUSY;
	}

	old = rtnl_dereference(tun->TUN_HASH_MEMBER);
	rcu_assign_pointer(tun->TUN_HASH_MEMBER, new);
	if (old)
		kfree_rcu_mightsleep(old);
	return 0;
}

/* The device goes, and no packet is on its way any more. */
static void tun_hash_free(struct tun_struct *tun)
{
	kfree(rcu_access_pointer(tun->TUN_HASH_MEMBER));
}

/* Choose a packet's queue; false leaves it to tun.  Under RCU. */
static bool tun_hash_select_queue(struct tun_struct *tun, struct sk_buff *skb, u16 *queue)
{
	struct tun_prog *prog = rcu_dereference(tun->steering_prog);
	struct tun_hash_view view = tun_hash_of(tun);
	u32 numqueues = READ_ONCE(tun->numqueues);
	struct tun_hash_input input;
	u32 chosen;

	if (!numqueues)
		return false;

	if (prog) {
		if (!TUN_HASH_EBPF_FALLBACK)
			return false;
		chosen = bpf_prog_run_clear_cb(prog->prog, skb);
		if (chosen != TUN_STEERINGEBPF_FALLBACK) {
			*queue = (u16)chosen % numqueues;
			return true;
		}
	}

	if (view.rss) {
		tun_hash_parse(skb, view.types, &input);
		chosen = view.unclassified;
		if (input.words)
			chosen = view.table[tun_hash_toeplitz(view.key, &input) & view.mask];
		*queue = chosen % numqueues;
		return true;
	}

	/* Not left to tun, which would run the program again. */
	if (prog)
		*queue = tun_automq_select_queue(tun, skb);
	return prog;
}

/*
 * Before a packet is put into the ring: keep what is to be reported of it, or that there is
 * nothing.  false: drop it.  Under RCU.
 */
static bool tun_hash_xmit(struct tun_struct *tun, struct sk_buff *skb)
{
	struct tun_hash_view view = tun_hash_of(tun);
	struct tun_hash_cb *cb = tun_hash_cb(skb);
	struct tun_hash_input input;

	cb->value = 0;
	cb->report = VIRTIO_NET_HASH_REPORT_NONE;
	if (view.report) {
		tun_hash_parse(skb, view.types, &input);
		cb->report = input.report;
		if (!input.words)
			cb->value = 0;
		else if (view.rss)
			cb->value = tun_hash_toeplitz(view.key, &input);
		else
			cb->value = skb_get_hash(skb); /* the kernel's flow hash */
	}
	return !view.drops;
}

/* Whether what is redirected to the device is not to be taken.  Under RCU. */
static bool tun_hash_drops(const struct tun_struct *tun)
{
	return tun_hash_of(tun).drops;
}

/*
 * Write, or skip, the room bytes of the header that are behind struct virtio_net_hdr.  There is no
 * skb, and no hash, where a packet came through XDP.
 */
static int tun_hash_put(const struct tun_struct *tun, const struct sk_buff *skb,
			struct iov_iter *iter, size_t room)
{
	struct tun_hash_tail tail = {};
	bool report;

	rcu_read_lock();
	report = tun_hash_of(tun).report;
	rcu_read_unlock();

	if (report && room >= sizeof(tail)) {
		if (skb) {
			tail.hash_value = cpu_to_le32(tun_hash_cb(skb)->value);
			tail.hash_report = cpu_to_le16(tun_hash_cb(skb)->report);
		}
		if (copy_to_iter(&tail, sizeof(tail), iter) != sizeof(tail))
			return -EFAULT;
		room -= sizeof(tail);
	}
	iov_iter_advance(iter, room);
	return 0;
}

#endif /* TUN_HASH_OPS_H */
