"""Evaluate a model: questions and their prompts, likelihoods of texts and answers."""
