# SPDX-License-Identifier: BSD-2-Clause
"""Device states of real QEMUs, and what a guest, or a broken file, could make of them."""

import base64
import itertools
import random
import struct
import time
import zlib

import pytest

from qsteer import devicestate
from qsteer.errors import NotFoundError, QsteerError, UnsupportedError
from qsteer.rss import BASE_TYPES, TABLE_MAX, HashType, RssConfig, equal_table, weighted_table

# A NIC of four queue pairs as QEMU wrote it, from the footer before its section to the header after it: compressed, for
# most of it are zeros.
STREAMS = {
    "7.2": (
        "c-rmVzfTik7{KxO%AHU!dJq)DV2EW<BerSL7#Ev3YY0IH21|jH)F7?bD=`kFF*>jrCntjm#6e<>lMY697Q;WFgNcKK4h$ql>%BkP#;b#o=)("
        "7N+`aeoxu?CmwlCY$B_YHKJKUrPQlazmFMT?dTrBuOp*XVO1w!iy*Vy);a627W#xc3EHp0!<w?E7=Vt=)@zddNF@sWwU!!Ryf%WfPHK21F9c"
        "GzZL#bd6m;vo}H^~Y44(y`o+m--zM(R(jmm9J)XiT}#Zeo)tYtPxiuu^WkpbexFPCnEKUNPQwwKOCta{>`~rW;|$#uGE+M({T65_=M;iy=tl"
        "ZSeK4hMO_~lZ&bvdPnmKP*QU(-tz&CPzUiW)nO`1Kr_zj9vvP1+v8vzKjMu7i=xoI+a**$wDvYg{!l+)?=i0m&b8sdjBTHOsT_E-@t1;NZZq"
        "Ih!bq=*AvXNPDu`uH${c>4-hE(kZ5q=ssuUwui25)kQw=TZ^bU!`uee=xYqm$=Oo~k|Rd;j^)H-B>O#<NQwU;V-9>~4wu<E3MFOXF@P&yG$P"
        "g4}g4A5?r#-Ay;Vp>mdSdd(qnxK;5gI;|&`l9^z9{Y9^txTa%k=bf2gwsd|uWhR)kj#tObgfeboQ@?7SZ|#AZP#&82g^6F9iADb}3&#z<IRF"
        "3v000000000000000000000001hy~yb^Z2`R7fuGNngM8qH4_nTFemqy2DI{+eXFY$Rm29lCuYju?Hdv-RNn0}km8+Rtw6TEf_Mp3#v^5z}b"
        "-IH|Tf+gB)7?zknh)rldA&#@0+rKUPTHCh=-i5V?AHbbA{*w`&2!PL000000000000000000000000000000000000000000000000000PvT"
        "b1Lj8r%R$}`yjdZC*KaA@rtNT(>CVrT3c2Y@VSd&W=xj!2M|<Yxi_`h}#*YiCbhvi;KLPR-(P;"
    ),
    "10.0": (
        "c-rmVzfTik9LMqJN>3;dIS_+kYAgc_QVMZkv2iCM#5h_CJ+KKvy<Q1nAdN9HnHUoj;-ZNmCQQUQxXI$+Wa6NMiQzwxAPWxG=U3ZsH8GLs!ux"
        "gHJ@>ii9@@KJpYhubA;fT8ZpH@E(xm#!TuG0v7K5<3GP3N4!swD~>}XJU?XIVCOl_P!xjA_I)1D)`tIhqRK}WY+Hh0RH5S|mSpCJEDBI~uq?"
        "Y_>_UR>v-&9nV6ozo_({Y0tX6%oDn6IJzUPKWrf;@N$Dy_f5`8p&QHCrwU8#-}3VQ<3qh$oQei_@UptH^;U;j_62#tG$%Fmu7B=zKNTTzK=C"
        "!xGHMq#6*2W?8S3Cyq>G}^RDMv)wDHpQoof(-ps1TZRDMO)tqbOZQZmtvmUQLIX%!h-j%6VGw-!=G4|x~ag`i#OKxj8)0z*tdZOd4UxD^}?#"
        "1RrHd63ci}U_yP%i6dNRPcH<kOx1{N};;?w$+5*WUG7czf~V)~7G;rk?ybdUkz%;qYm7V(tCZhspHAKh6ivDVNwkUfNE#)bHl#)rq-cm|O7k"
        "VI}bO-Sp%QRkMuSYfn+l-HKl^-DaZLwG+mxtZ5(F{MhD_&4JBnn=>YFPTL7)#^jv?JHZ^9yzSWurO#$Nemi3)me<0zdjbFe0000000000000"
        "000000000000fHTPLvt<GNwJ^x%%3(hA<zdGiFvoMH`QqrEm4Y8EH#_UAsw?1`f(?$XPSR3L!1Pt^v6F=bOy8_McCyHT=}X#UCkqbfK2y!4r"
        "TBpEGnGwR3K8f&Q{|+kD1qs-uNNs$AhPlzkIi*atN;K2000000000000000000000000000000000000000000000008i}-1GKF1j}JQ2>pU"
        "Q<Tx90I~JFlOlN++RLsp)ic1AM!1QKR?|9eZ(#l+Zss7`Fx?8Rt!7tW;&jJ"
    ),
    "11.1": (
        "c-rmVKTH#09LDkY+B=}&pF%(ki3zcq;D9YHF~)_OI5`nx94!S-(*yypSE3;yjWHx{!sKFtlY@z(aWTZuSr_7FTv!~94Pmyv@4at1xjGn$E_^"
        "?w_ug~w`ySV8`;NaZ2_c4Txf$utNSD-K_IxJ2Q1blJ-0-aH3$05&W4i+)+3qA&j;W1RlbibH4>Lv_sfPQz16I&JF}YL5gh*O;bAUWeBA<-gW"
        "<SW|Nju1cCQtOnf}GJ=?I-4Y9TCy}Fi}<i&FT>Um7U)XUhnB<u10b)k_UB8Mdqg>^HY)esmS~@k@07Lb8VJsk6WT6^S$w0?w-7MUG$9Ju!8&"
        "8P=>0ap$8_KGh!=)X1d9X6XyNa*=pNXO+3uC;8OO+uUA#$gn3OhZD9_^w}*LKon5_i`5-ULrmNA=*Shy&^x$|dr;;UZ%55&!2uI-XvYL%8?A"
        "G4)2TotOoDEOA3#BPH?Ul>w!)66@$K>ROke}N}oiDdey}v)U@nY@EhJ7{R6)vxS{7~F{-Pd;X+4$4XU%$P3TR->8`GZS3*dz9jAMt}doD=$v"
        "rbn_DCrf_emRs~Io?HH9-4V^Zp1v>|9g>t^VYMbX-DZet?pEANc!t<Y#w<r!y(}!wo8`#M>t&~ImY*Gyw@m(|$FDy&%gd_C>n6W3dCTPH_`1"
        "nEW*NF7Ok3j{1^@s6000000000000000000000000ujGP`*7Qnsdd&NT8FZ!-LY&re<cwv63l)f`J?Rv9eXY;A*3aI)5s(^{9WzteiAn4O|O"
        "<D^JsQMzh#z||DfuOHuj_ofv5S&xjK4~dFp!?R$vHgVzbYIOJ+h3GG_idYF`wJ9^yzE=nyA&$`0000000000000000000000000000000000"
        "0000000000000000{4M90`4PdgU-W!;TBzUdTaw!mTW+$Q#i{vHVX{)1nKl!2Z&vl@x^B<RO%`XGKQ0(_%V&r86T+t2y#"
    ),
    "11.1, behind a root port": (
        "c-rmV&ui0Q9LMn|UFz1&A8DC7hRDzzylm}$AhL@UhJSzzy}7k(l)~I*n~ojEsKcYsF}!T2A%fs(sDHrlAc6?$Q9KO6vm(3b#QHqRH|>`0<aO"
        "^COP+l4<awHwHn1GNSyoC7*?Kj6E~AZ^zo9|X4rbB|#gbQ?8<=%H73k7SY`6EC(;jz}rMFeX)ZcLHxY}%N@Aj&sX}?JB)Po#7tgosYEou8})"
        "heS7V`ba?HnHSbcDPf|lz8a0*|P2D$BymiKFLqJV|F;L&SpFDsyiN?KlwIMwan{uC;$Ke006L$UET5j-@g!MCzAVud@;<~NUlb*6Uj2ZKQg{"
        "QGQR(?`vuaTvQ$Urd;OW-?71<aQlmF5{~kcyxKvg3;J`#UBDN6@m%P5?H_g0hnzm-H`lr&!tLDaoiZ`?09Bbs7KVN$@Z=1&4b;$bp!IVz*dT"
        "_3dHzNm+jF@Dp+s!wKqss~#TiLC>?JM!q%^P_G1$Uu1?WRlRviT-i{@AN}a9!zd@bjMa^Y1_Iy|d?kkLQ>6Dlbo@7ROdzul>1|82dW$X8g&c"
        ">pQ=;zI~P#J+e#uOz?@Ohla1@i{9iNH|JGKZh7AoM}?ny`toS>5J&%b&DAKLltWB&zv5P!GsHF=xe%p-3&Q#jxzPNSye0XC<W<RQL0-+sg=b"
        "i@%(p7@)nvY!%vbv$`IB6L3QF2-eqjIr0000000000000000000000000fTJj$lCl8qqF2gImc5+kDpPgfY_NZFe!7^xH&<{=v(3(MF?9t@e"
        "F0OtM5>sy6ch0Kf{G?Bg$07XP1$#_$Ux9nm3;>b4)}dR)svRu13{mhOQaBi-&d1!i4-LW`nF}?!2$&;tNToq6h*ND0000000000000000000"
        "0000000000000000000000000000000!2gS%l!pkGy<Ew2%>(i*Ygw;{ZM_=l%uUZ1C-ar!OhE<&y(6Y~wCnE7Ts}7wK3vf6)=Nj}A93f}as"
    ),
    "10.0, one queue pair": (
        "c-rmVF>ljA6u|LwVw0vt;6yD&U8tCfL`j-d9T*@R5>r(nMuL+VWGOVkaVn-NLLIwBNGu=*Bu19(6d{2S;sdZDW(J0qp+n7`?@S=9h=Klpitq"
        "0EogL-kTc5Xu5KFdfR_4pnW%a3CDwno`FbX=$n|>s;8F^&(7lfO0Toq?jW9`Z2+p8lpN1Pmt$NLLb(myuwv<&mYwd{0)yiLC5W^FT0;&s<f;"
        "zbkRp3Nk2S;uOe@6I}6LSZL6P~T=viGRwjeNKMw`7|C(#P09$uk`AO)0W7TU&b%w@a)D7QCz)gC8=0h8i-iW%cd7(9@Wg%CLYz&ze5j(&xFX"
        "uvA);O?=q9CRTWv{mTY4jYvX6obh(Gl+<4zFxBRW3>6gM@FL`E?Nms={i0GVm@V2;n_-<`?Zt>{w`}+%@h9};%FWMike|eh!@b$@+ox-()Gq"
        "1%lm#$`MZM6|Z^*g>7^+P{dO;;|c+VxJsOi|tazTekrz0udrhTqT|dt~B~iHFaH>GuQx0000000000000000000000000008*woT4cU;6I2$"
        "uilHi$d{)rXI`JLcbh@!UZ>@Uo8x49sJa5KF4$n1Y9W6V6G(C+lba|kAZjwFs)z`R3;+NC00000000000000000000000000000000000000"
        "00000000091f&MET}!CvHrk>8T1ENfe~E4FMZ(_XV1)EoVv-7**GY(-_OGk4pahSyGCE|{d{F%|v*V9k;y"
    ),
    "10.0, no RSS": (
        "c-rmVzi!h|6vy#<Q=2p`0=Fuv)TtsMu|U(LVqnT6R25<*O&WtDl_t1O#Z*OzJrz^c7vKS+%=8fuPr%X{hDvON`{y_j4if`QzaJ6XKc9PDx4v"
        "dPIaNwM3e0AEy<$AG|Ef<aTPK|)?Q|a>#i{a^&8Kj^p`v0K*<7$2eQ7p7KL3(2>h@rEe7&LF{#^2si6s^3ARAyVQ>sS`fgHQM8wD<JO5R^9x"
        "Lons9+!G+p~_kLP#V~urWe(J71Y1E-}io&2e};O@}|$_-28HGemOV4oSXk3H~!&Y?oG@7u2zec?~_mV5$ruzt2-~W`#YM4A!7>Xmog#C19`$"
        "(uG`&0mi13p52pFb)x+udi+#JhHO(WJi_<(F*hBlQ+{D7rJldtn#NXZY_Wj_6TFoY{UYc#KHZdb6xY1^d+pgqbe(4wAhxhz{U|UajTAj4<Ds"
        "HCzBtDi^uI>8}uE-F(d)truS=lc5FS78z`UQG^Ci$b}UCDcO|3aL}i{b0~YFAziUoTwr<i$vQ9!VZa9?SK|a{b|&lKrIu000000000000000"
        "0000000000007_y3Rk5qK>RLEnvLVMna1X{4%hwpM(?1r^`_g7lcQNN`}jT^TH7WA(p6)wnSiei<lLW)1$?b8=W<O3?1g>jjroQHw&uHV%rz"
        "fy*Yq7Z<{A;W+DK}-rUb4wmix>#C{T4%8%F*d%?bbj00000000000000000000000000000000000000000000000030D7+(IB6yrOlQeEC`"
        "~7^UX1g7jO?9bx(Cai>{mx-qCirUAR%^?z54)}AVfN*Mu53Pw$#2DotOW"
    ),
}

DEVICE = "0000:00:02.0"
BEHIND_ROOT_PORT = "0000:00:01.0:00.0"
WEIGHTED = weighted_table((1, 2, 3, 2))

WANTED = {
    "7.2": (DEVICE, "cb554e5a6f74bd5f16d243b9e7853254fdcb359e1e5a382a2cafa112dfeb7afb725a676aab4de4b8", WEIGHTED),
    "10.0": (DEVICE, "61d7b886f30c0f1372de117aff746867d298d6dbc54d95faf49f427a66f29a803478c94dcf3a308d", WEIGHTED),
    "11.1": (DEVICE, "890aaed01dbd793fbbaba0dbbb044a09725f4192cbca61bfb115060da1509dd9e5edb9b4f029af05", WEIGHTED),
    "11.1, behind a root port": (
        BEHIND_ROOT_PORT,
        "aa18991ecdd1fbcb0470fa44627cfb75b30d12783a82c292fc57093ae254c644a28c46e0f9b0e5da",
        equal_table(2),
    ),
    "10.0, one queue pair": (
        DEVICE,
        "741f61f5c6128cfac7368c1520fefaf6c929d99306c36c2c04cd4ae29e09cbec9d3e841147f516c1",
        equal_table(1),
    ),
}
"""Where each NIC is, and the key and table that ``ethtool -x`` told in its guest."""

VLANS = 512
AFTER_VLANS = 4 + 7 + 8
"""Bytes between the VLAN filter and the subsections, with guest offloads."""
SEVERAL_PAIRS = 2 + 2 + 4 * 3
"""As many more if there are four queue pairs."""
RSS = b"\x05\x15virtio-net-device/rss"
QUEUE = 28
"""Bytes of one queue in virtio_pci/modern_state."""


def stream(name: str) -> bytes:
    return zlib.decompress(base64.b85decode(STREAMS[name]))


def subsection(config: RssConfig, *, version: int = 1, enabled: int = 1, redirect: int = 1, report: int = 0) -> bytes:
    """As QEMU writes it."""
    supported = struct.pack("!I", 0x1FF) if version == 2 else b""
    return b"".join(
        (
            RSS,
            struct.pack("!IBBBI", version, enabled, redirect, report, config.types),
            supported,
            struct.pack("!HH", len(config.table), config.unclassified_queue),
            config.key,
            struct.pack(f"!{len(config.table)}H", *config.table),
        )
    )


FORGED = RssConfig(types=HashType.UDP4, key=b"\x66" * 40, table=(3,))


def put(data: bytes, position: int, what: bytes) -> bytes:
    assert position > 0
    return data[:position] + what + data[position + len(what) :]


def fields_end(data: bytes) -> int:
    """Where the NIC's fields end and its subsections begin."""
    found = data.find(RSS)
    return found if found >= 0 else data.index(b"\x05\x15virtio/64bit_features")


def vlans(data: bytes) -> int:
    one_pair = data == stream("10.0, one queue pair")
    return fields_end(data) - AFTER_VLANS - (0 if one_pair else SEVERAL_PAIRS) - VLANS


def with_subsection(name: str, what: bytes) -> bytes:
    """A stream whose NIC has another RSS subsection, or ``what`` in place of it."""
    data = stream(name)
    start = data.index(RSS)
    length = 8 if name.startswith("11") else 4
    (entries,) = struct.unpack_from("!H", data, start + len(RSS) + 7 + length)
    return data[:start] + what + data[start + len(RSS) + 7 + length + 4 + 40 + 2 * entries :]


@pytest.mark.parametrize("name", WANTED)
def test_real_streams(name: str) -> None:
    device, key, table = WANTED[name]
    data = stream(name)
    assert devicestate.devices(data) == (device,)
    assert devicestate.parse(data, device) == RssConfig(types=BASE_TYPES, key=bytes.fromhex(key), table=table)


def test_a_nic_without_rss() -> None:
    data = stream("10.0, no RSS")
    assert devicestate.devices(data) == (DEVICE,)
    assert devicestate.parse(data, DEVICE) is None


def test_several_nics() -> None:
    data = stream("10.0") + stream("11.1, behind a root port") + stream("10.0, no RSS").replace(b":02.0/", b":03.0/")
    assert devicestate.devices(data) == (DEVICE, BEHIND_ROOT_PORT, "0000:00:03.0")
    for name in ("10.0", "11.1, behind a root port"):
        device, key, _ = WANTED[name]
        config = devicestate.parse(data, device)
        assert config and config.key.hex() == key
    assert devicestate.parse(data, "0000:00:03.0") is None


@pytest.mark.parametrize("device", ["0000:00:04.0", "00:02.0", "0000:00:02.0/", "", "x" * 300, "\u20ac", "\x00"])
def test_a_nic_that_is_not_there(device: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        devicestate.parse(stream("10.0"), device)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [*WANTED, "10.0, no RSS"])
def test_a_subsection_in_the_vlan_filter(name: str) -> None:
    """It comes before the true one, or stands alone, with a subsection or the end of the section behind it."""
    data = stream(name)
    device = devicestate.devices(data)[0]
    header = data.index(device.encode()) - 6
    for start in range(0, VLANS - 120, 7):
        for behind in (b"\x05\x15virtio/64bit_features", b"\x7e" + data[header + 1 : header + 5]):
            forged = put(data, vlans(data) + start, subsection(FORGED) + behind)
            assert devicestate.parse(forged, device) == devicestate.parse(data, device)


@pytest.mark.parametrize("name", ["7.2", "10.0", "11.1", "10.0, no RSS"])
def test_a_subsection_in_the_addresses_of_queues(name: str) -> None:
    """It comes after the true one.  24 bytes of a queue are the guest's, and its size and switch make a version 1."""
    data = stream(name)
    state = data.index(b"virtio_pci/modern_state")
    first = data.index(bytes(20 * QUEUE), state)
    forged = put(data, first + 1, subsection(FORGED) + b"\x05\x15virtio/64bit_features")
    assert forged.find(RSS, state) > 0
    assert devicestate.parse(forged, DEVICE) == devicestate.parse(data, DEVICE)


def test_a_section_in_the_vlan_filter() -> None:
    """A second header makes the NIC ambiguous; one for a NIC that is not there is none that can be read."""
    data = stream("10.0")
    header = b"\x04\0\0\0\x07\x17" + DEVICE.encode() + b"/virtio-net" + struct.pack("!II", 0, 11)
    forged = put(data, vlans(data), header)
    with pytest.raises(QsteerError, match="more than one NIC"):
        devicestate.parse(forged, DEVICE)
    other = put(data, vlans(data), header.replace(b":02.0", b":09.0"))
    assert devicestate.devices(other) == (DEVICE, "0000:00:09.0")
    assert devicestate.parse(other, DEVICE) == devicestate.parse(data, DEVICE)
    with pytest.raises(QsteerError):
        devicestate.parse(other, "0000:00:09.0")


def test_a_header_that_is_none() -> None:
    """The name alone, a wrong length, another kind of section, another instance, another version."""
    data = stream("10.0")
    start = data.index(DEVICE.encode())
    for position, byte in ((start - 1, 0x18), (start - 6, 0x01), (start + 26, 1)):
        with pytest.raises(NotFoundError):
            devicestate.parse(put(data, position, bytes((byte,))), DEVICE)
    with pytest.raises(UnsupportedError, match="another version"):
        devicestate.parse(put(data, start + 30, b"\x0c"), DEVICE)


@pytest.mark.parametrize("name", ["10.0", "11.1"])
def test_what_a_guest_may_ask_for(name: str) -> None:
    version = 2 if name.startswith("11") else 1
    for length in (1, 2, 64, TABLE_MAX):
        for config in (
            RssConfig(types=HashType(0x1FF), key=bytes(range(40)), table=(65535,) * length, unclassified_queue=65535),
            RssConfig(types=HashType(0), key=bytes(40), table=(0,) * length),
        ):
            data = with_subsection(name, subsection(config, version=version, report=1))
            assert devicestate.parse(data, DEVICE) == config


def test_hash_types_that_nobody_knows_are_left_out() -> None:
    part = subsection(FORGED)
    data = with_subsection("10.0", part.replace(struct.pack("!I", HashType.UDP4), struct.pack("!I", 0xFFFFFE04), 1))
    config = devicestate.parse(data, DEVICE)
    assert config and config.types == HashType.UDP4


def test_hash_reports_alone_do_not_steer() -> None:
    assert devicestate.parse(with_subsection("10.0", subsection(FORGED, redirect=0, report=1)), DEVICE) is None


BAD = {
    "not enabled": subsection(FORGED, enabled=0),
    "a flag of 2": subsection(FORGED, redirect=2),
    "version 0": subsection(FORGED, version=0),
    "version 3": subsection(FORGED, version=3),
    "no table": subsection(FORGED)[:-46] + bytes(4) + FORGED.key + b"\x05\x15virtio/64bit_features",
    "a table of 3": subsection(FORGED)[:-46] + struct.pack("!HH", 3, 0) + FORGED.key + bytes(6),
    "a table of 256": subsection(FORGED)[:-46] + struct.pack("!HH", 256, 0) + FORGED.key + bytes(512),
    "nothing known behind it": subsection(FORGED) + b"\x05\x04oops",
    "another subsection of the NIC": b"\x05\x19virtio-net-device/backend" + bytes(4),
    "nothing that begins a subsection": b"\0",
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_refused(what: str) -> None:
    with pytest.raises(UnsupportedError, match="the device state is not one of QEMU"):
        devicestate.parse(with_subsection("10.0", BAD[what]), DEVICE)


def test_every_truncation_is_refused() -> None:
    data = stream("11.1")
    end = len(data) - 60
    for length in (*range(0, 1600), *range(1600, end, 997), end - 1):
        with pytest.raises(QsteerError):
            devicestate.parse(data[:length], DEVICE)
    assert devicestate.parse(data[:end], DEVICE)


def test_fuzz() -> None:
    """Mutated streams raise nothing but QsteerError, and what is read from one is what RssConfig allows."""
    draw = random.Random(3)
    read = 0
    for name, _ in itertools.product(STREAMS, range(150)):
        data = bytearray(stream(name))
        device = devicestate.devices(stream(name))[0]
        interesting = fields_end(stream(name)) + 400
        for _ in range(draw.choice((1, 1, 2, 5, 40))):
            position = draw.randrange(min(interesting, len(data) + 1))
            data += b"\0" * (position == len(data))
            match draw.randrange(4):
                case 0:
                    data[position] = draw.choice((0, 1, 4, 5, 0x7E, 0x7F, 0x80, 0xFF, draw.randrange(256)))
                case 1:
                    del data[position : position + draw.randrange(64)]
                case 2:
                    data[position:position] = data[draw.randrange(interesting) :][: draw.randrange(700)]
                case 3:
                    del data[draw.randrange(1, len(data) + 1) :]
        for found in {device, *devicestate.devices(bytes(data))}:
            try:
                read += devicestate.parse(bytes(data), found) is not None
            except QsteerError as error:
                assert str(error).isprintable()
    assert read > 50


@pytest.mark.parametrize(
    "unit",
    [
        b"/virtio-net\0\0\0\0",
        b"\x04\0\0\0\x07\x17" + DEVICE.encode() + b"/virtio-net" + struct.pack("!II", 0, 11),
        b"\x04\x04\x04\x04\x04\x17" + DEVICE.encode() + b"/virtio-net" + bytes(4),
        b"\x7e\0\0\0\x31",
        RSS,
    ],
)
def test_the_time_is_linear(unit: bytes) -> None:
    """Eight megabytes of what is looked for; a quadratic search would take minutes."""
    data = stream("10.0")[:90] + unit * ((8 << 20) // len(unit))
    began = time.process_time()
    devicestate.devices(data)
    with pytest.raises(QsteerError):
        devicestate.parse(data, DEVICE)
    assert time.process_time() - began < 5
