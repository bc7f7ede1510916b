/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * What a tap's stub leaves in skb->cb for the shared body; part of QS_ABI.
 *
 *   cb[0], cb[1]  address of the key map's value
 *   cb[2], cb[3]  address of the table map's values, 8 bytes apart
 *   cb[4]         bits 0-15 unclassified queue, 16-22 table length - 1, 23-31 hash types
 */
#ifndef QS_HANDOVER_H
#define QS_HANDOVER_H

#include "abi.h"

#define QS_CB_QUEUE(word) ((word)&0xffff)
#define QS_CB_MASK(word) ((word) >> 16 & 0x7f)
#define QS_CB_TYPES(word) ((word) >> 23)
#define QS_CB_WORD(types, mask, queue) ((types) << 23 | (mask) << 16 | (queue))

/* How far apart the kernel keeps the entries of an array map (kernel/bpf/arraymap.c: elem_size). */
#define QS_TABLE_STRIDE 8

#define QS_BODIES_ENTRIES 1
#define QS_BODY_TAP 0

/* The prog_array that a host-wide pin keeps filled. */
#define QS_BODIES                                       \
	struct {                                        \
		__uint(type, BPF_MAP_TYPE_PROG_ARRAY);  \
		__uint(max_entries, QS_BODIES_ENTRIES); \
		__type(key, __u32);                     \
		__type(value, __u32);                   \
	}

#endif
