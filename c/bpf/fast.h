/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The path of nearly every packet: Ethernet, up to two VLAN tags, IPv4 without options or IPv6
 * without extension headers, all of it in the skb's linear area.
 *
 * Theory of operation
 *
 * No helper is called.  The packet, and what the stub hands over the address of, are read through
 * bpf_rdonly_cast() as 64-bit words.  For each such read the kernel's JIT emits seven instructions
 * more, which check the address, so there are as few of them as can be.  The struct that is cast to is
 * one that every kernel has and that is made of 64-bit numbers; a read may not straddle two of them.
 * Hence the packet's words begin 8 bytes before the IP header, which aligns all that counts.
 *
 * Whatever is out of the ordinary is left to the slow path, which begins anew: options, extension
 * headers, headers that are cut short or outside of the linear area.
 *
 * Every read is bounded on both sides before it happens; see reader_kctx.h.
 */
#ifndef QS_FAST_H
#define QS_FAST_H

#include "handover.h"
#include "kernel.h"
#include "reader_kctx.h"
#include "rss.h"
#include "toeplitz.h"

/* As many words as the type below has. */
struct qs_words {
	__u64 word[24];
};

static __always_inline const volatile struct qs_words *qs_words_at(__u64 address)
{
	return bpf_rdonly_cast((void *)address, bpf_core_type_id_kernel(struct rtnl_link_stats64));
}

#define QS_CB(skb, i) (((volatile __u64 *)(skb)->cb)[i])
#define QS_CB_WORD(skb) (((volatile __u32 *)(skb)->cb)[4])

/*
 * The windows of a tap's key, or (few) those for 12 bytes; key_at and first are what its stub left in
 * cb[0] and cb[2].
 */
static __always_inline void qs_tap_windows(__u64 key_at, __u64 first, int few,
					   __u64 window[QS_WINDOWS])
{
	if (key_at & QS_KEY_IN_MAP) {
		qs_key_windows(qs_words_at(key_at - QS_KEY_IN_MAP)->word, few, window);
	} else {
		const volatile struct qs_words *windows = qs_words_at(key_at);

		window[0] = first;
		window[1] = windows->word[1];
		if (few)
			return;
		window[2] = windows->word[2];
		window[3] = windows->word[3];
		window[4] = windows->word[4];
	}
}

/* What is not 0 ends the fast path. */
enum qs_verdict {
	QS_UNCLASSIFIED = 1,
	QS_SLOW,
};

/* A packet's words, its linear bytes without tags, and its ethertype in network order. */
struct qs_frame {
	const volatile struct qs_words *p;
	__s32 linear;
	__u16 proto;
};

/* Words 1 to 3 are read where there is an IPv4 header. */
#define QS_IP4_LINEAR (QS_ETH_HLEN + 24)

static __always_inline int qs_untag_once(struct qs_frame *f)
{
	f->linear -= 4;
	if (f->linear < QS_IP4_LINEAR)
		return QS_SLOW;
	f->p = qs_words_at((__u64)f->p + 4);
	f->proto = qs_last16(f->p->word[0]);
	return 0;
}

static __always_inline int qs_untag(struct __sk_buff *skb, struct qs_frame *f)
{
	if (!qs_is_tag(f->proto))
		return QS_UNCLASSIFIED;
	if (qs_untag_once(f))
		return QS_SLOW;
	if (!qs_is_tag(f->proto))
		return 0;
	/* the first of three may travel outside of the packet's data */
	return skb->vlan_present ? QS_UNCLASSIFIED : qs_untag_once(f);
}

/* The first two chunks. */
static __always_inline int qs_fast_ip4(const struct qs_frame *f, __u32 config, __u64 chunk[2])
{
	__u64 ip = f->p->word[1], source = f->p->word[2], rest = bpf_be64_to_cpu(f->p->word[3]);
	__u64 l4 = source & QS_BYTE(1, 0xff);

	if ((ip & QS_BYTE(0, 0xff)) != QS_BYTE(0, QS_IP4_PLAIN))
		return QS_SLOW;
	if (ip & bpf_cpu_to_be64(QS_IP4_FRAGMENT_BITS))
		l4 = 0;
	if (l4 == QS_BYTE(1, QS_IPPROTO_TCP) && (config & QS_IN_WORD(QS_HASH_TCP4))) {
		if (f->linear < QS_ETH_HLEN + 20 + 20)
			return QS_SLOW;
	} else if (l4 == QS_BYTE(1, QS_IPPROTO_UDP) && (config & QS_IN_WORD(QS_HASH_UDP4))) {
		if (f->linear < QS_ETH_HLEN + 20 + 8)
			return QS_SLOW;
	} else if (config & QS_IN_WORD(QS_HASH_IP4)) {
		rest &= ~0xffffffffULL;
	} else {
		return QS_UNCLASSIFIED;
	}
	chunk[0] = (bpf_be64_to_cpu(source) << 32 | rest >> 32) & QS_CHUNK_MASK;
	/* 6 bits of the address, and 32 */
	chunk[1] = rest << 26;
	return 0;
}

/* The words of the input. */
static __always_inline int qs_fast_ip6(const struct qs_frame *f, __u32 config, __u64 word[QS_WORDS])
{
	__s32 needed;
	__u32 wanted;
	__u64 ip, l4;

	if (f->linear < QS_ETH_HLEN + 40)
		return QS_SLOW;
	ip = f->p->word[1];
	if ((ip & QS_BYTE(0, 0xf0)) != QS_BYTE(0, 0x60))
		return QS_SLOW;
	l4 = ip & QS_BYTE(6, 0xff);
	if (l4 == QS_BYTE(6, QS_IPPROTO_TCP)) {
		wanted = QS_IN_WORD(QS_HASH_TCP6);
		needed = QS_ETH_HLEN + 40 + 20;
	} else if (l4 == QS_BYTE(6, QS_IPPROTO_UDP)) {
		wanted = QS_IN_WORD(QS_HASH_UDP6);
		needed = QS_ETH_HLEN + 40 + 8;
	} else {
		return QS_SLOW;
	}
	word[4] = 0;
	if (config & wanted) {
		if (f->linear < needed)
			return QS_SLOW;
		word[4] = bpf_be64_to_cpu(f->p->word[6]) & ~0xffffffffULL;
	} else if (!(config & QS_IN_WORD(QS_HASH_IP6))) {
		return QS_UNCLASSIFIED;
	}
#pragma unroll
	for (int i = 0; i < 4; i++)
		word[i] = bpf_be64_to_cpu(f->p->word[2 + i]);
	return 0;
}

/* A part of the hash of 12 bytes. */
static __always_inline __u64 qs_part_ip4(const __u64 window[QS_WINDOWS], const __u64 chunk[2],
					 enum qs_bits bits)
{
	struct qs_products x = {};

	qs_products_add(&x, window[0], chunk[0], bits);
	qs_products_add(&x, window[1], chunk[1], bits);
	return qs_products_fold(&x, bits);
}

#endif
