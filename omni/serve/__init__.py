"""Serve a checkpoint over HTTP, with the interface of OpenAI's audio and chat endpoints."""
