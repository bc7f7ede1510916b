/* SPDX-License-Identifier: BSD-2-Clause */
/* What a QEMU can do, by its own word. */
#ifndef QS_QEMU_PROBE_H
#define QS_QEMU_PROBE_H

#include <signal.h>
#include <stdbool.h>

#include "refusal.h"

struct qs_qemu {
	int major, minor;
	bool ebpf; /* it was built with eBPF, and takes ebpf-rss-fds */
};

/*
 * Run a QEMU for a moment, with a mask of signals.  0, or -1 and why that told nothing.  No process is left, and what
 * the caller has open is not inherited; a deadline is one of deadline.h.  The caller holds SIGPIPE and SIGCHLD back.
 */
int qs_qemu_probe(const char *path, const sigset_t *mask, long long deadline, struct qs_qemu *qemu,
		  struct qs_refusal *refusal);

#endif
