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

/* The loader needs no more than the above, for the windows of a key that is known in advance. */
#ifdef __bpf__

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

/* Which bits of the hash are computed at a time: so many words fit the registers. */
enum qs_bits {
	QS_BITS_0_TO_1, /* all that a table of four entries needs */
	QS_BITS_0_TO_3,
	QS_BITS_4_TO_6,
};

/* Words whose parities are bits of the hash. */
struct qs_products {
	__u64 a, b, c, d;
};

static __always_inline void qs_products_add(struct qs_products *x, __u64 window, __u64 chunk,
					    enum qs_bits bits)
{
	const int shift = bits == QS_BITS_4_TO_6 ? 2 : 6;

	x->a ^= window << shift & chunk;
	x->b ^= window << (shift - 1) & chunk;
	if (bits != QS_BITS_0_TO_1)
		x->c ^= window << (shift - 2) & chunk;
	if (bits == QS_BITS_0_TO_3)
		x->d ^= window << (shift - 3) & chunk;
	/* Now: the compiler would work on all chunks at once, and run out of registers. */
	asm volatile("" : "+r"(x->a), "+r"(x->b), "+r"(x->c), "+r"(x->d));
}

/* The words folded into one: every second bit, or every fourth, belongs to the same of them. */
static __always_inline __u64 qs_products_fold(const struct qs_products *x, enum qs_bits bits)
{
	__u64 first = qs_fold(x->a, x->b, 1, QS_ONES);

	if (bits == QS_BITS_0_TO_1)
		return first;
	if (bits == QS_BITS_4_TO_6)
		return qs_fold(first, (x->c ^ x->c >> 1) & QS_ONES, 2, QS_TWOS);
	return qs_fold(first, qs_fold(x->c, x->d, 1, QS_ONES), 2, QS_TWOS);
}

/* The hash, of which the lowest seven bits are right, out of its two parts. */
static __always_inline __u32 qs_hash_7(__u64 low, __u64 high)
{
	low = qs_fold(low, high, 4, QS_FOURS);
	low ^= low >> 32;
	low ^= low >> 16;
	return low ^ low >> 8;
}

/* The hash, of which the lowest two bits are right. */
static __always_inline __u32 qs_hash_2(__u64 low)
{
	low ^= low >> 32;
	low ^= low >> 16;
	low ^= low >> 8;
	low ^= low >> 4;
	return low ^ low >> 2;
}

/*
 * Any input, ready to be hashed: the chunks, and the windows that go with them.  In memory, for want of
 * registers.
 */
struct qs_hashing {
	volatile __u64 chunk[QS_WINDOWS];
	volatile __u64 window[QS_WINDOWS];
};

static __always_inline void qs_chunks(struct qs_hashing *h, const __u64 word[QS_WINDOWS])
{
	h->chunk[0] = word[0] & QS_CHUNK_MASK;
	h->chunk[1] = QS_CHUNK(1, word[0], word[1]);
	h->chunk[2] = QS_CHUNK(2, word[1], word[2]);
	h->chunk[3] = QS_CHUNK(3, word[2], word[3]);
	/* 56 bits */
	h->chunk[4] = word[3] << 40 | word[4] >> 24;
}

static __always_inline __u64 qs_part(const struct qs_hashing *h, enum qs_bits bits)
{
	struct qs_products x = {};

#pragma unroll
	for (int i = 0; i < QS_WINDOWS; i++)
		qs_products_add(&x, h->window[i], h->chunk[i], bits);
	return qs_products_fold(&x, bits);
}

#endif /* __bpf__ */

#endif
