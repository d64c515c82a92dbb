"""Whole experiments made with the library; none of it is imported by mmllm."""
