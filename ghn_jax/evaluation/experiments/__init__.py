"""The paper's experiments (§ 5, Appendix C), a file for each; `ghn-paper` runs them."""
