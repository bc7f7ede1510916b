/* SPDX-License-Identifier: BSD-2-Clause */
/* Fds that close themselves at the end of a scope. */
#ifndef QS_AUTO_H
#define QS_AUTO_H

#include <unistd.h>

static inline void qs_close(const int *fd)
{
	if (*fd >= 0)
		close(*fd);
}

#define qs_auto_close __attribute__((cleanup(qs_close)))

/* Out of the scope's hands, into the caller's. */
static inline int qs_take(int *fd)
{
	int taken = *fd;

	*fd = -1;
	return taken;
}

#endif
