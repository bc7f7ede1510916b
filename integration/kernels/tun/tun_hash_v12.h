/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Generation 12: a request for each of the ways to hash, all of them _IOR, the setters as well.
 *
 * TUNSETVNETREPORTINGAUTOMQ takes the types, and 0 is off.  The other two take a struct
 * tun_vnet_rss, a table of indirection_table_mask + 1 entries, and the beginning of a key.
 *
 * Next to nothing is checked, on purpose: that is how this generation is.
 */
#ifndef TUN_HASH_V12_H
#define TUN_HASH_V12_H

struct tun_vnet_rss {
	u32 hash_types;
	u16 indirection_table_mask;
	u16 unclassified_queue;
};

struct tun_vnet_hash {
	bool report;
	bool rss;
	struct tun_vnet_rss common;
	u32 rss_key[TUN_HASH_KEY_ROOM];
	u16 rss_indirection_table[];
};

#define TUNGETVNETHASHTYPES _IOR('T', 228, __u32)
#define TUNSETVNETREPORTINGAUTOMQ _IOR('T', 229, __u32)
#define TUNSETVNETREPORTINGRSS _IOR('T', 230, struct tun_vnet_rss)
#define TUNSETVNETRSS _IOR('T', 231, struct tun_vnet_rss)

#define TUN_HASH_STATE struct tun_vnet_hash
#define TUN_HASH_MEMBER vnet_hash
#define TUN_HASH_OR_EBPF false
#define TUN_HASH_REPORT_TAKES_HEADER false
#define TUN_HASH_EBPF_FALLBACK true

static long tun_hash_get(unsigned int cmd, void __user *argp)
{
	if (cmd != TUNGETVNETHASHTYPES)
		return -ENOIOCTLCMD;
	return put_user(TUN_HASH_TYPES, (u32 __user *)argp);
}

static bool tun_hash_is_set(unsigned int cmd)
{
	return cmd == TUNSETVNETREPORTINGAUTOMQ || cmd == TUNSETVNETREPORTINGRSS ||
	       cmd == TUNSETVNETRSS;
}

static TUN_HASH_STATE *tun_hash_copy_automq(const void __user *argp)
{
	TUN_HASH_STATE *state;
	u32 types;

	if (get_user(types, (const u32 __user *)argp))
		return ERR_PTR(-EFAULT);
	if (!types)
		return NULL;
	state = kzalloc(sizeof(*state), GFP_KERNEL);
	if (!state)
		return ERR_PTR(-ENOMEM);
	state->report = true;
	state->common.hash_types = types;
	return state;
}

static TUN_HASH_STATE *tun_hash_copy(unsigned int cmd, const void __user *argp)
{
	struct tun_vnet_rss common;
	TUN_HASH_STATE *state;
	size_t table;

	if (cmd == TUNSETVNETREPORTINGAUTOMQ)
		return tun_hash_copy_automq(argp);

	if (copy_from_user(&common, argp, sizeof(common)))
		return ERR_PTR(-EFAULT);
	argp += sizeof(common);
	table = (common.indirection_table_mask + 1) * sizeof(u16);

	/* Not zeroed: the rest of a key that is not read is whatever was in memory. */
	state = kmalloc(sizeof(*state) + table, GFP_KERNEL | __GFP_NOWARN);
	if (!state)
		return ERR_PTR(-ENOMEM);
	state->report = cmd == TUNSETVNETREPORTINGRSS;
	state->rss = true;
	state->common = common;

	if (copy_from_user(state->rss_indirection_table, argp, table) ||
	    tun_hash_copy_key(state->rss_key, argp + table, common.hash_types)) {
		kfree(state);
		return ERR_PTR(-EFAULT);
	}
	return state;
}

static void tun_hash_look(const TUN_HASH_STATE *state, struct tun_hash_view *view)
{
	view->report = state->report;
	view->rss = state->rss;
	view->types = state->common.hash_types;
	view->mask = state->common.indirection_table_mask;
	view->unclassified = state->common.unclassified_queue;
	view->key = state->rss_key;
	view->table = state->rss_indirection_table;
}

#endif /* TUN_HASH_V12_H */
