/* SPDX-License-Identifier: BSD-2-Clause */
/* The command line of the bridge helper: QEMU's, [--use-vnet] --br=BRIDGE --fd=N. */
#ifndef QS_BRIDGE_ARGS_H
#define QS_BRIDGE_ARGS_H

#include <stdbool.h>

#include "refusal.h"

enum qs_bridge_task {
	QS_MAKE_TAP,
	QS_SAY_HELP,
	QS_SAY_VERSION,
};

struct qs_bridge_args {
	enum qs_bridge_task task;
	const char *bridge; /* a name that a network device can have */
	int fd;		    /* not negative; that is all that is known of it */
	bool vnet_header;
};

/* 0, or -1 and why not.  Strict: options come once, and nothing else comes. */
int qs_bridge_args_parse(int count, char *const *words, struct qs_bridge_args *args,
			 struct qs_refusal *refusal);

#endif
