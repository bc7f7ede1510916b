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

/*
 * QEMU writes the configuration while packets are steered, and is not trusted: a length that the
 * specification does not allow makes every packet unclassified.
 */
static __always_inline int qs_length_ok(__u32 len)
{
	return len >= 1 && len <= QS_TABLE_ENTRIES && !(len & (len - 1));
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#endif
