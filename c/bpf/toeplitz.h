/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The low bits of a Toeplitz hash: virtio 1.2, 5.1.6.4.3.2.
 *
 * Theory of operation
 *
 * The hash is the XOR of the 32-bit windows of the key that start at each set bit of the input.
 * Seen per output bit: hash bit j (0 = least significant) is the parity of the input ANDed with the
 * key from its bit 31 - j on.  A table of 128 entries uses seven bits, so seven parities over the
 * input replace 288 steps; a table that repeats itself after four entries uses two.
 *
 * The seven parts of the key overlap but for six bits.  So the input is cut into chunks of 58 bits,
 * at the top of a 64-bit word each, and chunk i has one window: the key's 64 bits from bit
 * 58 * i + 25 on.  Shifted left by 0 to 6 it is, in its upper 58 bits, the key from bit 31 - j on
 * for j = 6 to 0.  Five chunks hold the longest input, 36 bytes.
 *
 * The words whose parities are wanted are folded together, two at a time: every second bit of the
 * result belongs to one, the bits between to the other.  Then every second pair of bits, and so on:
 * at last the bits of a byte are the parities.
 *
 * The input is words of 64 bits, big-endian bytes as numbers, zeroes behind its end: a zero bit adds
 * nothing to the hash.
 */
#ifndef QS_TOEPLITZ_H
#define QS_TOEPLITZ_H

#include "abi.h"

#define QS_CHUNK_BITS 58
#define QS_CHUNK_MASK (~0ULL << (64 - QS_CHUNK_BITS))

/* Window i out of the key's words i and i + 1; the key has five words, and a zero behind them. */
#define QS_WINDOW(i, word, next) ((word) << (25 - 6 * (i)) | (next) >> (39 + 6 * (i)))

/* Chunk i out of the input's words i - 1 and i. */
#define QS_CHUNK(i, before, word) \
	(((before) << (64 - 6 * (i)) | (word) >> (6 * (i))) & QS_CHUNK_MASK)

/* Words whose parities are the bits of the hash. */
struct qs_products {
	__u64 bit[7];
};

/* Add a chunk to the bits that a table needs: the lowest two, or all seven. */
static __always_inline void qs_products_add(struct qs_products *x, __u64 window, __u64 chunk,
					    int bits)
{
	if (bits > 2) {
		x->bit[6] ^= window & chunk;
		x->bit[5] ^= window << 1 & chunk;
		x->bit[4] ^= window << 2 & chunk;
		x->bit[3] ^= window << 3 & chunk;
		x->bit[2] ^= window << 4 & chunk;
	}
	x->bit[1] ^= window << 5 & chunk;
	x->bit[0] ^= window << 6 & chunk;
}

#define QS_ONES 0x5555555555555555ULL
#define QS_TWOS 0x3333333333333333ULL
#define QS_FOURS 0x0f0f0f0f0f0f0f0fULL

/* Fold two words into one: groups of n bits by turns of the first, which even says, and the second. */
static __always_inline __u64 qs_fold(__u64 x, __u64 y, int n, __u64 even)
{
	x ^= x >> n;
	y ^= y << n;
	return ((x ^ y) & even) ^ y;
}

/* The hash, of which the lowest bits are right: two or seven. */
static __always_inline __u32 qs_products_hash(const struct qs_products *x, int bits)
{
	__u64 low = qs_fold(x->bit[0], x->bit[1], 1, QS_ONES), high;

	if (bits > 2) {
		low = qs_fold(low, qs_fold(x->bit[2], x->bit[3], 1, QS_ONES), 2, QS_TWOS);
		high = x->bit[6] ^ x->bit[6] >> 1;
		high = qs_fold(qs_fold(x->bit[4], x->bit[5], 1, QS_ONES), high & QS_ONES, 2,
			       QS_TWOS);
		low = qs_fold(low, high, 4, QS_FOURS);
	}
	low ^= low >> 32;
	low ^= low >> 16;
	low ^= low >> 8;
	if (bits <= 2) {
		low ^= low >> 4;
		low ^= low >> 2;
	}
	return low;
}

/* The products of any input. */
static __always_inline struct qs_products qs_products(const __u64 window[QS_WINDOWS],
						      const __u64 word[QS_WINDOWS], int bits)
{
	struct qs_products x = {};

	qs_products_add(&x, window[0], word[0] & QS_CHUNK_MASK, bits);
	qs_products_add(&x, window[1], QS_CHUNK(1, word[0], word[1]), bits);
	qs_products_add(&x, window[2], QS_CHUNK(2, word[1], word[2]), bits);
	qs_products_add(&x, window[3], QS_CHUNK(3, word[2], word[3]), bits);
	/* 56 bits */
	qs_products_add(&x, window[4], word[3] << 40 | word[4] >> 24, bits);
	return x;
}

#endif
