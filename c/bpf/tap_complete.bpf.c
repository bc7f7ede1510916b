// SPDX-License-Identifier: BSD-2-Clause
/* A tap's own program with everything in it, where the shared body cannot load. */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"
#include "reader_helper.h"
#include "rss.h"

SEC("socket")
int qsteer_tap(struct __sk_buff *skb)
{
	__u64 word[QS_WORDS] = {}, key[QS_KEY_WORDS];
	struct qs_config config = {};
	struct qs_rss_key *raw;
	__u32 at = 0, i; /* at is alive throughout: no pointer may have been where it is stored */
	struct qs_reader r;
	__u16 *entry;

	if (!qs_config_get(&config))
		return config.queue;
	raw = bpf_map_lookup_elem(&tap_rss_map_toeplitz_key, &at);
	if (!raw || qs_reader_init(&r, skb) || qs_classify(skb, &r, config.types, word))
		return config.queue;

	key[0] = (__u64)raw->leftmost_32_bits << 32 | bpf_ntohl(*(__u32 *)raw->rest);
#pragma unroll
	for (i = 1; i < QS_WORDS; i++)
		key[i] = qs_be64(raw->rest + i * 8 - 4);
	key[QS_WORDS] = 0;

	at = qs_bucket(word, key) & config.mask & (QS_TABLE_ENTRIES - 1);
	entry = bpf_map_lookup_elem(&tap_rss_map_indirection_table, &at);
	return entry ? *entry : config.queue;
}
