"""Graph hypernetworks: GHN-2, GHN-1 and the MLP baseline (paper § 2.2, § 4, B)."""
