/* SPDX-License-Identifier: BSD-2-Clause */
/* The access list of QEMU's bridge helpers, /etc/qemu/bridge.conf. */
#ifndef QS_BRIDGE_ACL_H
#define QS_BRIDGE_ACL_H

#include "refusal.h"

/*
 * 0 if the list in a file allows the caller a bridge, -1 and why if not.  The caller is the process's real user; the
 * effective one has to be the same, with no right to read more: an include that the caller cannot read is none.
 */
int qs_bridge_acl_check(const char *path, const char *bridge, struct qs_refusal *refusal);

#endif
