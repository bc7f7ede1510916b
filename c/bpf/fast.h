/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The path of nearly every packet: Ethernet, up to two VLAN tags, IPv4 without options or IPv6
 * without extension headers, all of it in the skb's linear area.
 *
 * Theory of operation
 *
 * No helper is called.  The packet, and what the stub hands over the address of, are read through
 * bpf_rdonly_cast() as 64-bit words: for each such read the kernel's JIT emits seven more
 * instructions that check the address, so there are as few of them as can be.  The struct that is cast to
 * is one that every kernel has and that is made of 64-bit numbers; a read may not straddle two of
 * them.  Hence the packet's words begin 8 bytes before the IP header, which aligns all that counts.
 *
 * Whatever is out of the ordinary is left to the slow body, which begins anew: options, extension
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

/* The source address in the lower half of a word; the destination's, and ports or 0, in another. */
static __always_inline struct qs_products qs_products_ip4(const __u64 window[QS_WINDOWS],
							  __u64 source, __u64 rest, int bits)
{
	struct qs_products x = {};

	qs_products_add(&x, window[0], (source << 32 | rest >> 32) & QS_CHUNK_MASK, bits);
	/* 6 bits of the address, and 32 */
	qs_products_add(&x, window[1], rest << 26, bits);
	return x;
}

#endif
