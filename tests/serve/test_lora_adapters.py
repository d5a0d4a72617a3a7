"""What the server tells of the adapters that it was started with."""


def test_adapters_are_listed_as_llama_server_does(serve):
    client, _, _ = serve(adapters=(("a.gguf", 1.0), ("folder", 0.5)))
    assert client.get("/lora-adapters").json() == [
        {"id": 0, "path": "a.gguf", "scale": 1.0},
        {"id": 1, "path": "folder", "scale": 0.5},
    ]


def test_without_adapters_the_list_is_empty(serve):
    client, _, _ = serve()
    assert client.get("/lora-adapters").json() == []


def test_scales_stay_as_they_are(serve):
    client, _, _ = serve(adapters=(("a.gguf", 1.0),))
    answer = client.post("/lora-adapters", json=[{"id": 0, "scale": 0.0}])
    assert answer.status_code == 501
    assert answer.json()["error"]["message"] == (
        "the scales of adapters must be given at the start, by --lora-scaled."
    )
