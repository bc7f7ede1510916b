// SPDX-License-Identifier: BSD-2-Clause
/*
 * A tap's own program where the host has a shared body: it owns the tap's three maps, so that they
 * live exactly as long as the tap's program, and hands their addresses to the body.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "handover.h"
#include "maps.h"

QS_BODIES qsteer_bodies SEC(".maps");

SEC("socket")
int qsteer_tap(struct __sk_buff *skb)
{
	struct qs_config config = {};
	struct qs_rss_key *key;
	__u32 zero = 0, i;
	__u16 *table;

	if (!qs_config_get(&config))
		return config.queue;
	key = bpf_map_lookup_elem(&tap_rss_map_toeplitz_key, &zero);
	table = bpf_map_lookup_elem(&tap_rss_map_indirection_table, &zero);
	if (!key || !table)
		return config.queue;

	((__u64 *)skb->cb)[0] = (__u64)key;
	((__u64 *)skb->cb)[1] = (__u64)table;
	skb->cb[4] = QS_CB_WORD(config.types, config.mask, config.queue);
	bpf_tail_call(skb, &qsteer_bodies, QS_BODY_TAP);

	/*
	 * The body is gone (its pin was removed): `qsteer status` calls this broken.  Flows are still
	 * spread, by the hash that the kernel may have at hand.  cb held addresses: not for QEMU's
	 * eyes, who may run this program with BPF_PROG_TEST_RUN.
	 */
	((__u64 *)skb->cb)[0] = 0;
	((__u64 *)skb->cb)[1] = 0;
	skb->cb[4] = 0;
	i = skb->hash & config.mask & (QS_TABLE_ENTRIES - 1);
	table = bpf_map_lookup_elem(&tap_rss_map_indirection_table, &i);
	return table ? *table : config.queue;
}
