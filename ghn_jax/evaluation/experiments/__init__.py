"""The paper's experiments beyond accuracies of predicted parameters (§ 5.2, § 5.3, C.2)."""
