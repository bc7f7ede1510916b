// SPDX-License-Identifier: BSD-2-Clause
/*
 * A tap's own program with everything in it, where the shared body cannot load.
 *
 * Theory of operation
 *
 * It loads with CAP_BPF alone.  The verifier then puts a speculation barrier behind each store to the
 * stack that is the first one to its place, or that keeps a pointer; it costs as much as half a call
 * of a helper.  What a helper has written to is no first store.  So a plain packet is loaded into a
 * buffer on the stack with one call, and whatever does not fit the registers is kept in that buffer.
 * That leaves no room to the compiler: what is volatile here has to stay so.
 *
 * The rest, which is slower, is in a function of its own with its own place on the stack.
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"
#include "reader_helper.h"
#include "rss.h"

/* From 8 bytes before the IP header, which aligns all that counts, to the end of a TCP header. */
#define QS_FROM (QS_ETH_HLEN - 8)
#define QS_IP4_BYTES (8 + 20 + 20)
#define QS_IP6_BYTES (8 + 40 + 20)

/* Compute it here: what comes before is done, and what comes after has not begun. */
#define qs_now(value) asm volatile("" : "+r"(value))

/* Everything that a packet may look like. */
static __noinline int qs_closer(struct __sk_buff *skb)
{
	__u64 word[QS_WORDS] = {}, window[QS_WINDOWS];
	struct qs_rss_config *raw_config;
	const volatile __u64 *key;
	struct qs_hashing h;
	struct qs_reader r;
	__u64 low;
	__u32 at[2] = {}, config; /* for 6.1 an index has eight bytes to itself, throughout */
	__u16 *entry;

	/* The verifier follows a branch that was guessed wrong, too, to where no word was written. */
	asm volatile("" : : "r"(word) : "memory");
	raw_config = bpf_map_lookup_elem(&tap_rss_map_configurations, at);
	if (!raw_config)
		return 0;
	config = qs_config_word(raw_config);
	key = bpf_map_lookup_elem(&tap_rss_map_toeplitz_key, at);
	if (!key || qs_reader_init(&r, skb) || qs_classify(skb, &r, QS_WORD_TYPES(config), word))
		return QS_WORD_QUEUE(config);
	qs_chunks(&h, word);
	qs_key_windows(key, 0, window);
#pragma unroll
	for (int i = 0; i < QS_WINDOWS; i++)
		h.window[i] = window[i];
	low = qs_part(&h, QS_BITS_0_TO_3);
	at[0] = qs_hash_7(low, qs_part(&h, QS_BITS_4_TO_6)) & QS_WORD_MASK(config);
	entry = bpf_map_lookup_elem(&tap_rss_map_indirection_table, at);
	return entry ? *entry : QS_WORD_QUEUE(config);
}

/* A constant that is not kept for later. */
static __always_inline __u64 qs_once(__u64 value)
{
	qs_now(value);
	return value;
}

/* Add a product to a word whose parity is a bit of the hash. */
static __always_inline void qs_term(__u64 *x, __u64 window, __u64 chunk, int bit)
{
	*x ^= window << (6 - bit) & chunk;
	qs_now(*x);
}

/* Such a word, of 12 bytes of input or of 36: the chunks, and the last window, are in p. */
static __always_inline __u64 qs_product(volatile __u64 *p, const __u64 window[QS_WINDOWS], int ip6,
					int bit)
{
	__u64 x = 0;

	qs_term(&x, window[0], p[2], bit);
	qs_term(&x, window[1], p[3], bit);
	if (ip6) {
		qs_term(&x, window[2], p[4], bit);
		qs_term(&x, window[3], p[5], bit);
		qs_term(&x, p[0], p[6], bit);
	}
	return x;
}

static __always_inline __u64 qs_fold_now(__u64 x, __u64 y, int n, __u64 even)
{
	x = qs_fold(x, y, n, qs_once(even));
	qs_now(x);
	return x;
}

/* The hash, one word after the other: even fewer registers than qs_part() needs. */
static __always_inline __u64 qs_hash(volatile __u64 *p, const __u64 window[QS_WINDOWS], int ip6)
{
	__u64 low, high, x, y;

	x = qs_product(p, window, ip6, 0);
	y = qs_product(p, window, ip6, 1);
	low = qs_fold_now(x, y, 1, QS_ONES);
	x = qs_product(p, window, ip6, 2);
	y = qs_product(p, window, ip6, 3);
	high = qs_fold_now(x, y, 1, QS_ONES);
	low = qs_fold_now(low, high, 2, QS_TWOS);
	x = qs_product(p, window, ip6, 4);
	y = qs_product(p, window, ip6, 5);
	high = qs_fold_now(x, y, 1, QS_ONES);
	x = qs_product(p, window, ip6, 6);
	high = qs_fold_now(high, (x ^ x >> 1) & qs_once(QS_ONES), 2, QS_TWOS);
	low = qs_fold_now(low, high, 4, QS_FOURS);
	low ^= low >> 32;
	low ^= low >> 16;
	return low ^ low >> 8;
}

/* The queue of a hash; slot is where an index may be. */
static __always_inline int qs_entry(__u64 hash, __u32 config, void *slot)
{
	__u16 *entry;

	*(volatile __u32 *)slot = hash & QS_WORD_MASK(config);
	entry = bpf_map_lookup_elem(&tap_rss_map_indirection_table, slot);
	return entry ? *entry : QS_WORD_QUEUE(config);
}

/* IPv4, after the Ethernet header without any tag; buffer begins QS_FROM bytes into the packet. */
static __always_inline int qs_plain_ip4(struct __sk_buff *skb, __u64 *buffer)
{
	volatile __u64 *p = buffer;
	__u64 window[QS_WINDOWS], c0, c1;
	struct qs_rss_config *raw;
	const volatile __u64 *key;
	__u32 config, wanted, l4;

	if ((p[1] & QS_BYTE(0, 0xff)) != QS_BYTE(0, QS_IP4_PLAIN))
		return qs_closer(skb);
	p[5] = 0;
	raw = bpf_map_lookup_elem(&tap_rss_map_configurations, &buffer[5]);
	if (!raw)
		return 0;
	config = qs_config_word(raw);
	p[4] = 0;
	key = bpf_map_lookup_elem(&tap_rss_map_toeplitz_key, &buffer[4]);
	if (!key)
		return QS_WORD_QUEUE(config);

	c0 = bpf_be64_to_cpu(p[2]);
	c1 = bpf_be64_to_cpu(p[3]);
	l4 = c0 >> 48 & 0xff;
	if (p[1] & bpf_cpu_to_be64(QS_IP4_FRAGMENT_BITS))
		l4 = 0;
	wanted = l4 == QS_IPPROTO_TCP ? QS_IN_WORD(QS_HASH_TCP4) :
		 l4 == QS_IPPROTO_UDP ? QS_IN_WORD(QS_HASH_UDP4) :
					0;
	if (!(config & wanted)) {
		if (!(config & QS_IN_WORD(QS_HASH_IP4)))
			return QS_WORD_QUEUE(config);
		c1 &= ~0xffffffffULL;
	}
	p[0] = config;
	p[2] = (c0 << 32 | c1 >> 32) & QS_CHUNK_MASK;
	/* 6 bits of the address, and 32 */
	p[3] = c1 << 26;
	qs_key_windows(key, 1, window);
	return qs_entry(qs_hash(p, window, 0), p[0], &buffer[1]);
}

/* The same of IPv6. */
static __always_inline int qs_plain_ip6(struct __sk_buff *skb, __u64 *buffer)
{
	volatile __u64 *p = buffer;
	__u64 window[QS_WINDOWS], word, next;
	struct qs_rss_config *raw;
	const volatile __u64 *key;
	__u32 config, wanted, l4;

	l4 = bpf_be64_to_cpu(p[1]) >> 8 & 0xff;
	if ((p[1] & QS_BYTE(0, 0xf0)) != QS_BYTE(0, 0x60) ||
	    (l4 != QS_IPPROTO_TCP && l4 != QS_IPPROTO_UDP))
		return qs_closer(skb);
	/* three places for indices: of an address that is used again the compiler would keep a copy */
	p[7] = 0;
	raw = bpf_map_lookup_elem(&tap_rss_map_configurations, &buffer[7]);
	if (!raw)
		return 0;
	config = qs_config_word(raw);
	p[0] = 0;
	key = bpf_map_lookup_elem(&tap_rss_map_toeplitz_key, &buffer[0]);
	if (!key)
		return QS_WORD_QUEUE(config);

	wanted = l4 == QS_IPPROTO_TCP ? QS_IN_WORD(QS_HASH_TCP6) : QS_IN_WORD(QS_HASH_UDP6);
	next = bpf_be64_to_cpu(p[6]) >> 32 << 32;
	if (!(config & wanted)) {
		if (!(config & QS_IN_WORD(QS_HASH_IP6)))
			return QS_WORD_QUEUE(config);
		next = 0;
	}
	p[1] = config;
	/* the chunks take the place of the words, */
	word = bpf_be64_to_cpu(p[5]);
	p[6] = word << 40 | next >> 24;
	next = bpf_be64_to_cpu(p[4]);
	p[5] = QS_CHUNK(3, next, word);
	word = bpf_be64_to_cpu(p[3]);
	p[4] = QS_CHUNK(2, word, next);
	next = bpf_be64_to_cpu(p[2]);
	p[3] = QS_CHUNK(1, next, word);
	p[2] = next & QS_CHUNK_MASK;
	/* and a window that of the ethertype */
	qs_key_windows(key, 0, window);
	p[0] = window[4];
	/* of the last word the helper has written the first half, just enough for an index */
	return qs_entry(qs_hash(p, window, 1), p[1], &buffer[8]);
}

/* Neither IP nor a tag, for sure: the unclassified queue. */
static __always_inline int qs_not_ip(struct __sk_buff *skb)
{
	__u64 buffer[1];
	volatile __u32 *at = (volatile __u32 *)buffer;
	struct qs_rss_config *raw;
	__u16 proto;

	/* with six bytes of an address before it, so that all eight are written */
	if (bpf_skb_load_bytes_relative(skb, 6, buffer, 8, BPF_HDR_START_MAC))
		return -1;
	proto = qs_last16(buffer[0]);
	if (proto == bpf_htons(QS_ETH_P_IP) || proto == bpf_htons(QS_ETH_P_IPV6) ||
	    qs_is_tag(proto))
		return -1;
	*at = 0;
	raw = bpf_map_lookup_elem(&tap_rss_map_configurations, buffer);
	return raw ? (int)QS_WORD_QUEUE(qs_config_word(raw)) : 0;
}

SEC("socket")
int qsteer_tap(struct __sk_buff *skb)
{
	__u64 buffer[QS_IP6_BYTES / 8 + 1];
	volatile __u64 *p = buffer;

	/* What the kernel takes the packet for is only a hint, of how much to load. */
	if (skb->protocol == bpf_htons(QS_ETH_P_IPV6)) {
		if (bpf_skb_load_bytes_relative(skb, QS_FROM, buffer, QS_IP6_BYTES,
						BPF_HDR_START_MAC) ||
		    qs_last16(p[0]) != bpf_htons(QS_ETH_P_IPV6))
			return qs_closer(skb);
		return qs_plain_ip6(skb, buffer);
	}
	if (skb->protocol != bpf_htons(QS_ETH_P_IP)) {
		int queue = qs_not_ip(skb);

		return queue < 0 ? qs_closer(skb) : queue;
	}
	if (bpf_skb_load_bytes_relative(skb, QS_FROM, buffer, QS_IP4_BYTES, BPF_HDR_START_MAC) ||
	    qs_last16(p[0]) != bpf_htons(QS_ETH_P_IP))
		return qs_closer(skb);
	return qs_plain_ip4(skb, buffer);
}
