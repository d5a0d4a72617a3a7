"""The engine over HTTP: routes as clients of OpenAI and llama.cpp expect them, and a chat page."""
