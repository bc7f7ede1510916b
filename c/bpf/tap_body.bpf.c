// SPDX-License-Identifier: BSD-2-Clause
/*
 * The body that all stubs of a host call: the packet path of every tap in one place, so that many
 * taps share it in the caches.
 *
 * BPF_PROG_TEST_RUN shows skb->cb to whoever holds the stub, QEMU for one: no address may stay in it.
 */
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <stddef.h>

#include "fast.h"

/* Of the word of the handover: the table needs more than two bits of the hash. */
#define QS_MORE_THAN_2_BITS (0x7cU << QS_WORD_MASK_SHIFT)

static __always_inline void qs_cb_clear(struct __sk_buff *skb)
{
	QS_CB(skb, 0) = 0;
	QS_CB(skb, 1) = 0;
	QS_CB_WORD(skb) = 0;
}

/* The entry of a tap's table. */
static __always_inline int qs_queue(__u64 key_at, __u64 table_at, __u32 bucket)
{
	if (key_at & QS_KEY_IN_MAP)
		return qs_at16(table_at + bucket * QS_TABLE_STRIDE);
	return qs_at8(key_at + offsetof(struct qs_steering, table) + bucket);
}

struct qs_input {
	__u64 word[QS_WORDS];
};

/*
 * The Toeplitz input of whatever a packet may look like, or a negative value.  A global function, which
 * the verifier goes through once.
 */
__noinline int qs_slow(struct __sk_buff *skb, __u32 types, struct qs_input *input)
{
	struct qs_reader r;

	if (!input || qs_reader_init(&r, skb))
		return -1;
	return qs_classify(skb, &r, types, input->word);
}

SEC("socket")
int qsteer_body(struct __sk_buff *skb)
{
	struct sk_buff *k = bpf_cast_to_kern_ctx(skb);
	__u64 mac = (__u64)k->head + k->mac_header;
	__u64 pulled = (__u64)k->data - mac;
	__s32 linear = k->tail - k->mac_header, needed;
	const volatile struct qs_words *p = qs_words_at(mac + 6);
	__u64 ip, l4, source, rest, key_at, table_at, window[QS_WINDOWS], word[QS_WORDS];
	__u32 config = QS_CB_WORD(skb), wanted, bucket;
	struct qs_products x;
	__u16 proto;

	if (pulled != 0 && pulled != QS_ETH_HLEN)
		goto unclassified;
	if (linear < QS_ETH_HLEN + 20)
		goto slow;
	proto = qs_last16(p->word[0]);
	if (proto != bpf_htons(QS_ETH_P_IP) && proto != bpf_htons(QS_ETH_P_IPV6)) {
		if (!qs_is_tag(proto))
			goto unclassified;
		linear -= 4;
		if (linear < QS_ETH_HLEN + 20)
			goto slow;
		p = qs_words_at((__u64)p + 4);
		proto = qs_last16(p->word[0]);
		if (qs_is_tag(proto)) {
			/* the first of three may travel outside of the packet's data */
			if (skb->vlan_present)
				goto unclassified;
			linear -= 4;
			if (linear < QS_ETH_HLEN + 20)
				goto slow;
			p = qs_words_at((__u64)p + 4);
			proto = qs_last16(p->word[0]);
		}
	}
	if (proto == bpf_htons(QS_ETH_P_IP)) {
		ip = p->word[1];
		source = p->word[2];
		rest = bpf_be64_to_cpu(p->word[3]);
		if ((ip & QS_BYTE(0, 0xff)) != QS_BYTE(0, QS_IP4_PLAIN))
			goto slow;
		l4 = source & QS_BYTE(1, 0xff);
		source = bpf_be64_to_cpu(source);
		if (ip & bpf_cpu_to_be64(QS_IP4_FRAGMENT_BITS)) {
			l4 = 0;
		}
		if (l4 == QS_BYTE(1, QS_IPPROTO_TCP) && (config & QS_IN_WORD(QS_HASH_TCP4))) {
			if (linear < QS_ETH_HLEN + 20 + 20)
				goto slow;
		} else if (l4 == QS_BYTE(1, QS_IPPROTO_UDP) &&
			   (config & QS_IN_WORD(QS_HASH_UDP4))) {
			if (linear < QS_ETH_HLEN + 20 + 8)
				goto slow;
		} else if (config & QS_IN_WORD(QS_HASH_IP4)) {
			rest &= ~0xffffffffULL;
		} else {
			goto unclassified;
		}
		qs_tap_windows(QS_CB(skb, 0), QS_CB(skb, 1), 1, window);
		if (!(config & QS_MORE_THAN_2_BITS)) {
			x = qs_products_ip4(window, source, rest, 2);
			goto two;
		}
		x = qs_products_ip4(window, source, rest, 7);
	} else if (proto == bpf_htons(QS_ETH_P_IPV6)) {
		if (linear < QS_ETH_HLEN + 40)
			goto slow;
		ip = p->word[1];
		if ((ip & QS_BYTE(0, 0xf0)) != QS_BYTE(0, 0x60))
			goto slow;
		l4 = ip & QS_BYTE(6, 0xff);
		if (l4 == QS_BYTE(6, QS_IPPROTO_TCP)) {
			wanted = QS_IN_WORD(QS_HASH_TCP6);
			needed = QS_ETH_HLEN + 40 + 20;
		} else if (l4 == QS_BYTE(6, QS_IPPROTO_UDP)) {
			wanted = QS_IN_WORD(QS_HASH_UDP6);
			needed = QS_ETH_HLEN + 40 + 8;
		} else {
			goto slow;
		}
		word[4] = 0;
		if (config & wanted) {
			if (linear < needed)
				goto slow;
			word[4] = bpf_be64_to_cpu(p->word[6]) & ~0xffffffffULL;
		} else if (!(config & QS_IN_WORD(QS_HASH_IP6))) {
			goto unclassified;
		}
#pragma unroll
		for (int i = 0; i < 4; i++)
			word[i] = bpf_be64_to_cpu(p->word[2 + i]);
hash:
		qs_tap_windows(QS_CB(skb, 0), QS_CB(skb, 1), 0, window);
		if (!(config & QS_MORE_THAN_2_BITS)) {
			x = qs_products(window, word, 2);
			goto two;
		}
		x = qs_products(window, word, 7);
	} else {
		goto unclassified;
	}
	bucket = qs_products_hash(&x, 7);
found:
	key_at = QS_CB(skb, 0);
	table_at = QS_CB(skb, 1);
	qs_cb_clear(skb);
	return qs_queue(key_at, table_at, bucket & QS_WORD_MASK(config));

two:
	bucket = qs_products_hash(&x, 2);
	goto found;
unclassified:
	qs_cb_clear(skb);
	return QS_WORD_QUEUE(config);
slow : {
	struct qs_input input = {};

	if (qs_slow(skb, QS_WORD_TYPES(config), &input))
		goto unclassified;
#pragma unroll
	for (int i = 0; i < QS_WORDS; i++)
		word[i] = input.word[i];
	goto hash;
}
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
