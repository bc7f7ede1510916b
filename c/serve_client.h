/* SPDX-License-Identifier: BSD-2-Clause */
/* The client of "qsteer serve": a steering program for a tap that this process has open. */
#ifndef QS_SERVE_CLIENT_H
#define QS_SERVE_CLIENT_H

#include "refusal.h"

#define QS_PROGRAM_FDS 4

struct qs_program {
	int fds[QS_PROGRAM_FDS]; /* in the order of ebpf-rss-fds, close-on-exec: program, config, key, table */
	char name[64]; /* for people */
};

/*
 * 0, or -1 and why not.  queue_fd is one of the tap's.  A deadline is one of deadline.h; what the service says is
 * bounded, and not yet made printable.
 */
int qs_serve_program(const char *socket_path, int queue_fd, long long deadline,
		     struct qs_program *program, struct qs_refusal *refusal);

#endif
