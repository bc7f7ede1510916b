/* SPDX-License-Identifier: BSD-2-Clause */
/* A moment of the monotonic clock, in milliseconds, after which nothing is waited for. */
#ifndef QS_DEADLINE_H
#define QS_DEADLINE_H

#include <errno.h>
#include <poll.h>
#include <time.h>

static inline long long qs_now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Never negative: that would be for ever. */
static inline int qs_left_ms(long long deadline)
{
	long long left = deadline - qs_now_ms();

	return left > 0 ? (int)left : 0;
}

/* 0 once there is something to read, be it the end; else -1 and errno, which is ETIMEDOUT at the deadline. */
static inline int qs_wait_readable(int fd, long long deadline)
{
	struct pollfd one = { .fd = fd, .events = POLLIN };
	int ready;

	do
		ready = poll(&one, 1, qs_left_ms(deadline));
	while (ready < 0 && errno == EINTR);
	if (!ready)
		errno = ETIMEDOUT;
	return ready > 0 ? 0 : -1;
}

#endif
