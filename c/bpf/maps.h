/* SPDX-License-Identifier: BSD-2-Clause */
/* The per-tap maps, as QEMU's ebpf/ebpf_rss.c maps them, and the program's identity. */
#ifndef QS_MAPS_H
#define QS_MAPS_H

#include "handover.h"

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
 * The word of handover.h for what QEMU wrote: read once, whatever it writes meanwhile.  QEMU is not
 * trusted: a length that the specification does not allow makes every packet unclassified.
 */
static __always_inline __u32 qs_config_word(const volatile struct qs_rss_config *raw)
{
	/* The compiler would read a packed structure byte by byte. */
	__u64 first = *(const volatile __u64 *)raw;
	__u32 queue = ((const volatile __u16 *)raw)[4];
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	__u32 redirect = first & 0xff, types = first >> 16 & QS_HASH_ALL, len = first >> 48;
#else
	__u32 redirect = first >> 56, types = first >> 16 & QS_HASH_ALL, len = first & 0xffff;
#endif

	if (!redirect || len < 1 || len > QS_TABLE_ENTRIES || (len & (len - 1)))
		types = 0;
	return QS_WORD(types, (len - 1) & (QS_TABLE_ENTRIES - 1), queue);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#endif
