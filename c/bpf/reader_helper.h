/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Reads the packet through helpers alone, for CAP_BPF without CAP_PERFMON and for kernels without
 * bpf_cast_to_kern_ctx (before 6.2).
 *
 * Theory of operation
 *
 * bpf_skb_load_bytes_relative() knows the MAC header but sees the linear area only;
 * bpf_skb_load_bytes() sees the whole packet but starts at skb->data, which is the MAC header on a
 * tap and 14 bytes behind it under BPF_PROG_TEST_RUN.  So the second one serves what the first
 * cannot, once the two have been compared: where both read the same 14 bytes, data starts at the
 * MAC header.
 */
#ifndef QS_READER_HELPER_H
#define QS_READER_HELPER_H

#define QS_ETH_HLEN 14

struct qs_reader {
	struct __sk_buff *skb;
	__u64 start; /* any number, of which the verifier knows nothing */
};

static __always_inline int qs_reader_init(struct qs_reader *r, struct __sk_buff *skb)
{
	r->skb = skb;
	r->start = (__u64)skb->hash << 32 | skb->len;
	return 0;
}

/* Not inlined: the same for every header, and off the fast path. */
static __noinline int qs_bytes_pulled(struct __sk_buff *skb)
{
	__u64 mac[2] = {}, data[2] = {};

	if (bpf_skb_load_bytes_relative(skb, 0, mac, QS_ETH_HLEN, BPF_HDR_START_MAC))
		return -1;
	if (bpf_skb_load_bytes(skb, 0, data, QS_ETH_HLEN))
		return QS_ETH_HLEN;
	return mac[0] == data[0] && mac[1] == data[1] ? 0 : QS_ETH_HLEN;
}

/* 0 and the bytes at a place, or a negative value: the packet does not have them. */
static __always_inline int qs_load(const struct qs_reader *r, __u64 at, void *to, const __u32 len)
{
	__u64 off = at - r->start;
	int pulled;

	if (off > 0xffff)
		return -1;
	if (!bpf_skb_load_bytes_relative(r->skb, off, to, len, BPF_HDR_START_MAC))
		return 0;
	pulled = qs_bytes_pulled(r->skb);
	if (pulled < 0 || off < (__u32)pulled)
		return -1;
	return bpf_skb_load_bytes(r->skb, off - pulled, to, len);
}

/* Whether the packet has len bytes at a place. */
static __always_inline int qs_has(const struct qs_reader *r, __u64 at, __u32 len)
{
	__u8 last;

	return !qs_load(r, at + len - 1, &last, 1);
}

#endif
