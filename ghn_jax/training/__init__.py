"""Training of hypernetworks (paper Eq. 2, § 4.3), on one device or many."""
