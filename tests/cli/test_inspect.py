"""What `inspect` says of the work to come."""


def test_it_says_how_score_gets_its_gradients(make_run, influence):
    run = make_run()
    assert "score            one pass: it computes, stores" in influence("inspect", run).out
    assert "and keeps none" in influence("inspect", run, "--cache", "none").out
    influence("score", run)
    assert "score            reads stored gradients" in influence("inspect", run).out
