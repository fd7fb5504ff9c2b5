"""The HTTP server: chats and completions as OpenAI's API has them."""
