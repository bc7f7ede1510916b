/* SPDX-License-Identifier: BSD-2-Clause */
/* The per-tap maps, as QEMU's ebpf/ebpf_rss.c maps them, and the program's identity. */
#ifndef QS_MAPS_H
#define QS_MAPS_H

#include "abi.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct qs_rss_config);
} tap_rss_map_configurations SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct qs_rss_key);
} tap_rss_map_toeplitz_key SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, QS_TABLE_ENTRIES);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u16);
} tap_rss_map_indirection_table SEC(".maps");

const volatile struct qs_ident qsteer_ident = {};

/* What a program works with for one packet: read once, whatever QEMU writes meanwhile. */
struct qs_config {
	__u32 types;
	__u32 mask;  /* table length - 1 */
	__u32 queue; /* unclassified */
};

/*
 * Nonzero if packets are to be hashed.  QEMU is not trusted: a length that the specification does
 * not allow makes every packet unclassified.
 */
static __always_inline int qs_config_get(struct qs_config *config)
{
	const volatile struct qs_rss_config *raw;
	__u32 zero = 0, len;

	raw = bpf_map_lookup_elem(&tap_rss_map_configurations, &zero);
	if (!raw)
		return 0;
	len = raw->indirections_len;
	config->queue = raw->default_queue;
	config->types = raw->hash_types & QS_HASH_ALL;
	config->mask = len - 1;
	return raw->redirect && config->types && len >= 1 && len <= QS_TABLE_ENTRIES &&
	       !(len & (len - 1));
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#endif
