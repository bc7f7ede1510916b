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
	/* Addresses to cast, whatever the verifier makes of them: what is compared are other numbers. */
	__u64 mac = (__u64)k->head + k->mac_header;
	__u64 pulled = (__u64)k->data - mac;
	struct qs_frame frame = {
		.p = qs_words_at(mac + 6),
		.linear = k->tail - k->mac_header,
	};
	__u64 window[QS_WINDOWS], word[QS_WORDS], chunk[2], low, high, key_at, table_at;
	__u32 config = QS_CB_WORD(skb), bucket;
	struct qs_hashing h;
	int verdict;

	if (pulled != 0 && pulled != QS_ETH_HLEN)
		goto unclassified;
	if (frame.linear < QS_IP4_LINEAR)
		goto slow;
	frame.proto = qs_last16(frame.p->word[0]);
	if (frame.proto != bpf_htons(QS_ETH_P_IP) && frame.proto != bpf_htons(QS_ETH_P_IPV6)) {
		verdict = qs_untag(skb, &frame);
		if (verdict)
			goto ends;
	}

	if (frame.proto == bpf_htons(QS_ETH_P_IP)) {
		verdict = qs_fast_ip4(&frame, config, chunk);
		if (verdict)
			goto ends;
		qs_tap_windows(QS_CB(skb, 0), QS_CB(skb, 1), 1, window);
		if (config & QS_MORE_THAN_2_BITS) {
			low = qs_part_ip4(window, chunk, QS_BITS_0_TO_3);
			high = qs_part_ip4(window, chunk, QS_BITS_4_TO_6);
			goto seven;
		}
		low = qs_part_ip4(window, chunk, QS_BITS_0_TO_1);
		goto two;
	}
	if (frame.proto != bpf_htons(QS_ETH_P_IPV6))
		goto unclassified;
	verdict = qs_fast_ip6(&frame, config, word);
	if (verdict)
		goto ends;
	qs_chunks(&h, word);
hash:
	qs_tap_windows(QS_CB(skb, 0), QS_CB(skb, 1), 0, window);
#pragma unroll
	for (int i = 0; i < QS_WINDOWS; i++)
		h.window[i] = window[i];
	if (config & QS_MORE_THAN_2_BITS) {
		low = qs_part(&h, QS_BITS_0_TO_3);
		high = qs_part(&h, QS_BITS_4_TO_6);
		goto seven;
	}
	low = qs_part(&h, QS_BITS_0_TO_1);
	goto two;

seven:
	bucket = qs_hash_7(low, high);
	goto found;
two:
	bucket = qs_hash_2(low);
found:
	key_at = QS_CB(skb, 0);
	table_at = QS_CB(skb, 1);
	qs_cb_clear(skb);
	return qs_queue(key_at, table_at, bucket & QS_WORD_MASK(config));

ends:
	if (verdict == QS_UNCLASSIFIED)
		goto unclassified;
slow : {
	struct qs_input input = {};

	if (qs_slow(skb, QS_WORD_TYPES(config), &input))
		goto unclassified;
	qs_chunks(&h, input.word);
	goto hash;
}
unclassified:
	qs_cb_clear(skb);
	return QS_WORD_QUEUE(config);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
