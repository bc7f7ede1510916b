/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Reads the packet straight out of the skb's linear area, and the rest of it through a helper.
 *
 * Theory of operation
 *
 * bpf_rdonly_cast() lets a program read any kernel address, and QEMU, which is handed the program's
 * fd, may attach the program to sockets of its own and see what it returns.  So every read is
 * bounded on both sides before it happens: it lies between the MAC header and the skb's tail, and
 * the MAC header is where tun (data starts there) or BPF_PROG_TEST_RUN (data starts 14 bytes
 * behind) have it.  Those of unix and UDP sockets have it nowhere near, or not at all: nothing is
 * read.
 */
#ifndef QS_READER_KCTX_H
#define QS_READER_KCTX_H

#include "kernel.h"

#define QS_MAC_UNSET 0xffff
#define QS_ETH_HLEN 14

extern void *bpf_cast_to_kern_ctx(void *obj) __ksym;
extern void *bpf_rdonly_cast(const void *obj, __u32 btf_id) __ksym;

struct qs_reader {
	struct __sk_buff *skb;
	__u64 start; /* the MAC header */
	__u64 end;   /* of the linear area */
	__u64 data;  /* where the helper's offsets begin */
};

/*
 * The number at a kernel address.  In assembly, since the compiler would merge such a load with one
 * from the stack, and the verifier wants each load to be of one kind.
 */
#define QS_DEFINE_AT(bits)                                                                         \
	static __always_inline __u##bits qs_at##bits(__u64 address)                                \
	{                                                                                          \
		void *from =                                                                       \
			bpf_rdonly_cast((void *)address, bpf_core_type_id_kernel(struct rb_node)); \
		__u64 value;                                                                       \
                                                                                                   \
		asm("%0 = *(u" #bits " *)(%1 + 0)" : "=r"(value) : "r"(from));                     \
		return value;                                                                      \
	}

QS_DEFINE_AT(8)
QS_DEFINE_AT(16)
QS_DEFINE_AT(32)
QS_DEFINE_AT(64)

/*
 * A pointer member as a plain number.  Read by its name, newer verifiers (6.17) call it untrusted
 * memory and lose track of what is added to it.
 */
#define QS_ADDRESS_IN(k, member) \
	qs_at64((__u64)((void *)(k) + bpf_core_field_offset(typeof(*(k)), member)))

static __always_inline int qs_reader_init(struct qs_reader *r, struct __sk_buff *skb)
{
	struct sk_buff *k = bpf_cast_to_kern_ctx(skb);
	__u64 head = QS_ADDRESS_IN(k, head);
	__u32 mac = k->mac_header;
	__u32 tail = k->tail;
	__u64 pulled = QS_ADDRESS_IN(k, data) - (head + mac);

	if (mac == QS_MAC_UNSET || mac > tail)
		return -1;
	if (pulled != 0 && pulled != QS_ETH_HLEN)
		return -1;
	r->skb = skb;
	r->start = head + mac;
	r->end = head + tail;
	r->data = r->start + pulled;
	return 0;
}

/* Whether the packet has len bytes at a place. */
static __always_inline int qs_has(const struct qs_reader *r, __u64 at, __u32 len)
{
	return at + len <= r->data + r->skb->len;
}

/*
 * 0 and the bytes at a place, or a negative value: the packet does not have them.  Straight from the
 * linear area, or through a helper where they are not there.
 */
static __always_inline int qs_load(const struct qs_reader *r, __u64 at, void *to, const __u32 len)
{
	__u32 done = 0;

	if (at + len > r->end) {
		if (at < r->data)
			return -1;
		return bpf_skb_load_bytes(r->skb, at - r->data, to, len);
	}
#pragma unroll
	for (; done + 8 <= len; done += 8)
		*(__u64 *)(to + done) = qs_at64(at + done);
	if (len & 4) {
		*(__u32 *)(to + done) = qs_at32(at + done);
		done += 4;
	}
	if (len & 2) {
		*(__u16 *)(to + done) = qs_at16(at + done);
		done += 2;
	}
	if (len & 1)
		*(__u8 *)(to + done) = qs_at8(at + done);
	return 0;
}

#endif
