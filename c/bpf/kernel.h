/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The few kernel structures that programs look into, each reduced to the members they read: CO-RE
 * finds the real offsets when a program is loaded.
 */
#ifndef QS_KERNEL_H
#define QS_KERNEL_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct sk_buff {
	__u32 len;
	__u16 mac_header;
	__u32 tail;
	unsigned char *head;
	unsigned char *data;
};

/* 64-bit numbers, 24 of them at least: what memory that has no type is read through. */
struct rtnl_link_stats64 {
	__u64 rx_packets;
};

/* Its first member is an unsigned long: what a plain number in kernel memory is read through. */
struct rb_node {
	unsigned long __rb_parent_color;
};

#pragma clang attribute pop

#endif
