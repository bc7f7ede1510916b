/* SPDX-License-Identifier: BSD-2-Clause */
/* What the in-process fuzzers share: a random generator (xorshift) that a seed repeats, and a check that aborts. */
#ifndef QS_FUZZ_H
#define QS_FUZZ_H

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#define COUNT(array) (sizeof(array) / sizeof(*(array)))
#define PICK(array) ((array)[draw(COUNT(array))])

static unsigned long long state;

static inline size_t draw(size_t limit)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (state >> 11) % limit;
}

static inline void check(int holds, const char *what)
{
	if (holds)
		return;
	fprintf(stderr, "wrong answer: %s\n", what);
	abort();
}

#endif
