"""Between a chat and plain text: prompts that show tools, and replies told into content, thinking and calls."""
