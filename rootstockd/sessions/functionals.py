"""Functionals that there are parameters for in D3, so that a wrong name is refused before a model is loaded.

They are those of s-dftd3 1.7.0 (the package `dftd3`, https://github.com/dftd3/simple-dftd3), which the daemon need not
have: that computes in workers. Names have no case and no hyphens there.
"""

from __future__ import annotations

import difflib

_BJ_AND_ZERO = """
    b1b95 b1lyp b1p b1p86 b2gpplyp b2plyp b3lyp b3lyp3 b3lyp5 b3lypg b3p b3p86 b3pw91 b88b95 b971 b972 b973c b97d
    b98 bhandhlyp bhlyp blyp bmk bop bp bp86 bpbe camb3lyp dm21 dm21m dm21mc dm21mu hcth/407 hcth120 hcth407 hf
    hiss hse03 hse06 lcwpbe mpw1b95 mpw1kcis mpw1pw mpw1pw91 mpw2plyp mpwb1k mpwkcis1k mpwlyp mpwpw mpwpw91 o3lyp
    olyp opbe otpss pbe pbe0 pbe1kcis pbeh pbeh1pbe pbehpbe pbesol ptpss pw1pw pw6b95 pwb6k pwpb95 revpbe revpbe0
    revpbe38 revssb revtpss revtpss0 revtpssh rpbe rpw86pbe scan ssb tauhcth tauhcthhyb tpss tpss0 tpss1kcis tpssh
    wb97x x3lyp xlyp
"""
_BJ_ALONE = """
    b3lyp/631gd b97m dftb3 dodblyp dodhsep86 dodpbe dodpbeb95 dodpbehb95 dodpbep86 dodpbepbe dodscan66 dodsvwn5
    drpa75 dsdb98 dsdbb95 dsdblyp dsdblyp_2013 dsdblypfc dsdbmk dsdbp86 dsdbpbe dsdbpw91 dsdbvwn5 dsdhcth407
    dsdhselyp dsdhsep86 dsdhsepbe dsdhsepw91 dsdmpwb95 dsdmpwlyp dsdmpwp86 dsdmpwpbe dsdmpwpw91 dsdolyp dsdpbe
    dsdpbeb95 dsdpbedrpa75 dsdpbehb95 dsdpbehp86 dsdpbelyp dsdpbep86 dsdpbep86_2011 dsdpbep86drpa75 dsdpbepbe
    dsdpbepw91 dsdpbevwn5 dsdslyp dsdsp86 dsdspbe dsdsvwn5 dsdthcth dsdtpss dsdtpssb95 dsdtpsstpss dsdxb95 dsdxlyp
    hf/minis hf/mixed hf/sv hf3c hf3cv hsesol lcomegahpbe lcwhpbe m11 mn12l mn12sx mn15 n12sx optscsdrpa75 pbeh3c
    pw91 pwgga r2scan r2scan0 r2scan50 r2scanh revdodblyp revdodpbe revdodpbeb95 revdodpbep86 revdsdblyp revdsdpbe
    revdsdpbeb95 revdsdpbep86 rscan scsdrpa75 skala1.0 skala1.1 sogga11x wb97m
"""
_ZERO_ALONE = """
    cf22d m05 m052x m06 m062x m06hf m06l m08hx m11l mn15l mpw1lyp n12 pbe38 pkzb pw91p86 pwp slaterdiracexchange
"""
_MODIFIED = """
    b2plyp b3lyp b3lyp3 b3lyp5 b3lypg b97d blyp bp bp86 dm21 dm21m dm21mc dm21mu lcwpbe pbe pbe0 pbeh
"""

FUNCTIONALS = {
    "bj": frozenset(_BJ_AND_ZERO.split() + _BJ_ALONE.split()),
    "zero": frozenset(_BJ_AND_ZERO.split() + _ZERO_ALONE.split()),
    "bjm": frozenset(_MODIFIED.split()),
    "zerom": frozenset(_MODIFIED.split()),
}
"""Their names, by damping function."""


def functional(name: str, damping: str) -> str:
    """A functional's name as s-dftd3 spells it.

    Args:
        name: as it was written.
        damping: `bj`, `zero`, `bjm` or `zerom`.

    Raises:
        ValueError: there are no parameters for it with this damping; the nearest names are given.
    """
    plain, known = name.lower().replace("-", ""), FUNCTIONALS[damping]
    if plain in known:
        return plain
    near = difflib.get_close_matches(plain, sorted(known), n=3)
    others = [other for other in FUNCTIONALS if plain in FUNCTIONALS[other]]
    advice = (
        f" There are with {' and '.join(others)}."
        if others
        else f" Near it are {', '.join(near)}."
        if near
        else " Its names are those of s-dftd3, such as pbe, rpbe, r2scan."
    )
    raise ValueError(f"D3 has no parameters for the functional {name!r} with damping {damping!r}.{advice}")
