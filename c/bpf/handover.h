/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * What a tap's stub leaves in skb->cb for the shared body; part of QS_ABI.
 *
 * A stub whose configuration is frozen:
 *
 *   cb[0], cb[1]  address of its struct qs_steering, an even number
 *   cb[2], cb[3]  the first of its windows
 *   cb[4]         a word: bits 0-15 unclassified queue, 16-22 table length - 1, 23-31 hash types
 *
 * A stub over maps that QEMU writes:
 *
 *   cb[0], cb[1]  address of the key map's value, plus 1
 *   cb[2], cb[3]  address of the table map's values, 8 bytes apart
 *   cb[4]         the word; no types where packets are not to be hashed
 */
#ifndef QS_HANDOVER_H
#define QS_HANDOVER_H

#include "abi.h"

#define QS_WORD_MASK_SHIFT 16
#define QS_WORD_TYPES_SHIFT 23
#define QS_WORD_QUEUE(word) ((word)&0xffff)
#define QS_WORD_MASK(word) ((word) >> QS_WORD_MASK_SHIFT & 0x7f)
#define QS_WORD_TYPES(word) ((word) >> QS_WORD_TYPES_SHIFT)
#define QS_WORD(types, mask, queue) \
	((__u32)(types) << QS_WORD_TYPES_SHIFT | (__u32)(mask) << QS_WORD_MASK_SHIFT | (queue))

/* Types as they are in the word: tested as bits of it they need not be shifted out. */
#define QS_IN_WORD(types) ((__u32)(types) << QS_WORD_TYPES_SHIFT)

/* How far apart the kernel keeps the entries of an array map (kernel/bpf/arraymap.c: elem_size). */
#define QS_TABLE_STRIDE 8

/* In the address of the key: it is in a map of QEMU's. */
#define QS_KEY_IN_MAP 1

/* The prog_array that a host-wide pin keeps filled. */
#define QS_BODIES "qsteer_bodies"
#define QS_BODIES_ENTRIES 1
#define QS_BODY_TAP 0

#endif
