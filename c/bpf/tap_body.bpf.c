// SPDX-License-Identifier: BSD-2-Clause
/* The one body that all stubs of a host call: the packet path of every tap in one place. */
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "handover.h"
#include "reader_kctx.h"
#include "rss.h"

SEC("socket")
int qsteer_body(struct __sk_buff *skb)
{
	__u64 key_at = ((__u64 *)skb->cb)[0], table_at = ((__u64 *)skb->cb)[1];
	__u64 word[QS_WORDS] = {}, key[QS_KEY_WORDS];
	__u32 config = skb->cb[4], i;
	struct qs_reader r;

	/* BPF_PROG_TEST_RUN shows cb to whoever holds the program: no address may stay in it. */
	((__u64 *)skb->cb)[0] = 0;
	((__u64 *)skb->cb)[1] = 0;
	skb->cb[4] = 0;

	if (qs_reader_init(&r, skb) || qs_classify(skb, &r, QS_CB_TYPES(config), word))
		return QS_CB_QUEUE(config);

	key[0] = (__u64)qs_at32(key_at) << 32 | bpf_ntohl(qs_at32(key_at + 4));
#pragma unroll
	for (i = 1; i < QS_WORDS; i++)
		key[i] = bpf_be64_to_cpu(qs_at64(key_at + i * 8));
	key[QS_WORDS] = 0;

	i = qs_bucket(word, key) & QS_CB_MASK(config);
	return qs_at16(table_at + i * QS_TABLE_STRIDE);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
